"""Softmax attention, the default mixer."""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention


class Attention(SoftmaxAttention):
    """Multi-head attention over the new tokens and what memories offer (Vaswani et al. 2017, arXiv
    1706.03762), with grouped key/value heads if ``model.n_kv_heads`` is below ``model.n_heads``
    (Ainslie et al. 2023, arXiv 2305.13245).
    """

    name = "attention"
    citation = """@inproceedings{vaswani2017attention,
  title={Attention Is All You Need}, author={Vaswani, Ashish and others},
  booktitle={NeurIPS}, year={2017}}
@inproceedings{ainslie2023gqa,
  title={GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints},
  author={Ainslie, Joshua and Lee-Thorp, James and de Jong, Michiel and Zemlyanskiy, Yury and
    Lebr{\\'o}n, Federico and Sanghai, Sumit},
  booktitle={EMNLP}, year={2023}}"""


@hookimpl
def lswt_components() -> list[type]:
    """Offer softmax attention."""
    return [Attention]
