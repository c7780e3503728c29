"""Blocks whose residual stream is the pre-norm block's, x plus what sublayers add to it."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from lswt_core.interfaces import Block, BlockParts, Dims, LayerContext, LayerOutput, State
from lswt_core.plugin_api.blocks import SublayerRunner


class Sandwich(Block):
    """A norm before and after every sublayer: ``x + norm(mixer(norm(x)))``, then
    ``x + norm(ffn(norm(x)))``.

    Sandwich-LN of CogView (Ding et al. 2021, arXiv 2105.13290, section 2.4), the wiring of Gemma 2
    and "Peri-LN" of Kim et al. 2025 (arXiv 2502.02732, eq. 5), who also norm the embedding and
    the last hidden state, as the decoder does around any block.
    """

    name = "sandwich"
    citation = """@inproceedings{ding2021cogview,
  title={CogView: Mastering Text-to-Image Generation via Transformers},
  author={Ding, Ming and Yang, Zhuoyi and Hong, Wenyi and Zheng, Wendi and Zhou, Chang and
    Yin, Da and Lin, Junyang and Zou, Xu and Shao, Zhou and Yang, Hongxia and Tang, Jie},
  booktitle={NeurIPS}, year={2021}}
@inproceedings{kim2025peri,
  title={Peri-LN: Revisiting Normalization Layer in the Transformer Architecture},
  author={Kim, Jeonghoon and Lee, Byeongchan and Park, Cheonbok and Oh, Yeontaek and
    Kim, Beomjun and Yoo, Taehwan and Shin, Seongjin and Han, Dongyoon and Shin, Jinwoo and
    Yoo, Kang Min},
  booktitle={ICML}, year={2025}}"""

    def __init__(self, dims: Dims, parts: BlockParts) -> None:
        super().__init__(dims, parts)
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.attention_post_norm = parts.norm(dims)
        self.ffn_norm, self.ffn = parts.norm(dims), parts.ffn(dims)
        self.ffn_post_norm = parts.norm(dims)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]."""
        parts = SublayerRunner(state, context)
        x = x + self.attention_post_norm(parts.mix(self.attention, self.attention_norm(x)))
        x = x + self.ffn_post_norm(parts.feed_forward(self.ffn, self.ffn_norm(x)))
        return parts.output(x)


class Parallel(Block):
    """Mixer and feed-forward layer side by side: ``x + mixer(n) + ffn(n)`` with ``n = norm(x)``.

    GPT-J (Wang and Komatsuzaki 2021) and PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 2)
    norm once; ``shared_norm`` = false gives each its own norm, as in GPT-NeoX (Black et al. 2022,
    arXiv 2204.06745, section 2.1).
    """

    name = "parallel"
    citation = """@misc{wang2021gpt,
  title={GPT-J-6B: A 6 Billion Parameter Autoregressive Language Model},
  author={Wang, Ben and Komatsuzaki, Aran}, year={2021},
  howpublished={https://github.com/kingoflolz/mesh-transformer-jax}}
@article{chowdhery2022palm,
  title={PaLM: Scaling Language Modeling with Pathways},
  author={Chowdhery, Aakanksha and others}, journal={arXiv preprint arXiv:2204.02311},
  year={2022}}"""

    def __init__(self, dims: Dims, parts: BlockParts, *, shared_norm: bool = True) -> None:
        super().__init__(dims, parts)
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.ffn_norm = None if shared_norm else parts.norm(dims)
        self.ffn = parts.ffn(dims)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]."""
        parts = SublayerRunner(state, context)
        normed = self.attention_norm(x)
        mixed = parts.mix(self.attention, normed)
        if self.ffn_norm is not None:
            normed = self.ffn_norm(x)
        return parts.output(x + mixed + parts.feed_forward(self.ffn, normed))


class LayerScale(Block):
    """Pre-norm with a learned factor for every channel of what a sublayer adds:
    ``x + gamma * mixer(norm(x))``, then ``x + gamma' * ffn(norm(x))``.

    Touvron et al. 2021 (CaiT, arXiv 2103.17239, eq. 4). All factors start at ``init``: the paper
    takes 0.1 up to 18 layers, 1e-5 for 24, and 1e-6 for more.
    """

    name = "layer-scale"
    citation = """@inproceedings{touvron2021going,
  title={Going Deeper with Image Transformers},
  author={Touvron, Hugo and Cord, Matthieu and Sablayrolles, Alexandre and Synnaeve, Gabriel and
    J{\\'e}gou, Herv{\\'e}},
  booktitle={ICCV}, year={2021}}"""

    def __init__(
        self, dims: Dims, parts: BlockParts, *, init: Annotated[float, Gt(0)] = 0.1
    ) -> None:
        super().__init__(dims, parts)
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.ffn_norm, self.ffn = parts.norm(dims), parts.ffn(dims)
        self.attention_scale = nn.Parameter(torch.empty(dims.d_model))
        self.ffn_scale = nn.Parameter(torch.empty(dims.d_model))
        self.init = init

    def reset_parameters(self) -> None:
        """Set all factors to ``init``."""
        nn.init.constant_(self.attention_scale, self.init)
        nn.init.constant_(self.ffn_scale, self.init)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]."""
        parts = SublayerRunner(state, context)
        x = x + self.attention_scale * parts.mix(self.attention, self.attention_norm(x))
        x = x + self.ffn_scale * parts.feed_forward(self.ffn, self.ffn_norm(x))
        return parts.output(x)
