"""HuggingFace transformers: config and model classes, export, and import of the original authors'
checkpoints.

Importing this package registers the models with AutoConfig, AutoModel and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lswt_core.hf.configuration import LswtConfig
from lswt_core.hf.modeling import LswtForCausalLM, LswtModel

__all__ = ["LswtConfig", "LswtForCausalLM", "LswtModel"]

AutoConfig.register(LswtConfig.model_type, LswtConfig, exist_ok=True)
AutoModel.register(LswtConfig, LswtModel, exist_ok=True)
AutoModelForCausalLM.register(LswtConfig, LswtForCausalLM, exist_ok=True)
