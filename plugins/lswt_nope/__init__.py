"""No positional encoding (NoPE): order is known from the causal mask alone."""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import PositionalEncoding


class NoPosition(PositionalEncoding):
    """No positional encoding (Haviv et al. 2022, arXiv 2203.16634; Kazemnejad et al. 2023,
    arXiv 2305.19466).
    """

    name = "none"
    cacheable_keys = True
    citation = """@inproceedings{kazemnejad2023impact,
  title={The Impact of Positional Encoding on Length Generalization in Transformers},
  author={Kazemnejad, Amirhossein and Padhi, Inkit and Natesan Ramamurthy, Karthikeyan and
    Das, Payel and Reddy, Siva},
  booktitle={NeurIPS}, year={2023}}"""


@hookimpl
def lswt_components() -> list[type]:
    """Offer NoPE."""
    return [NoPosition]
