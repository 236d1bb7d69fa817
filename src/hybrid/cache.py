"""The cache entry of a hybrid layer: keys and values, Mamba states, or both.

It takes the place of the layer's entry in the DynamicCache while that is still empty, so that neither the configuration
nor the cache class needs to know of sidecars.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionAndFullAttentionLayer


class HybridCacheLayer(LinearAttentionAndFullAttentionLayer):
    """A cache entry with keys and values, Mamba states, or both; its length counts tokens whichever path saw them.

    transformers' own class takes its length from the keys, which is 0 when every layer is at alpha 1: RoPE and masks of
    the other layers would then start again at 0.
    """

    def __init__(self):
        super().__init__()
        self.mamba_tokens = 0

    def attention_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return DynamicLayer.get_seq_length(self)

    def get_seq_length(self) -> int:
        """Tokens seen, by either path."""
        return max(self.attention_tokens(), self.mamba_tokens)

    def reset(self) -> None:
        """Empty the entry."""
        super().reset()
        self.mamba_tokens = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows that beam search goes on with."""
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows given."""
        self._select(lambda tensor: tensor[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a recurrent state has no past to go back to."""
        if tokens_to_remove:
            raise ValueError("a cache with Mamba states cannot be rolled back; start a new cache")

    def _select(self, pick) -> None:
        if self.attention_tokens():
            self.keys, self.values = pick(self.keys), pick(self.values)
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = pick(state)


def hybrid_cache_layer(cache: Cache, layer: int) -> HybridCacheLayer:
    """The cache's entry for a hybrid layer, put in place while the entry is still empty."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    entry = cache.layers[layer]
    if isinstance(entry, HybridCacheLayer):
        return entry
    if type(entry) not in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
        raise ValueError(f"sidecars need a DynamicCache of full attention; layer {layer} has a {type(entry).__name__}")
    if entry.get_seq_length():
        raise ValueError(f"the cache holds tokens that layer {layer}'s sidecar has not seen; start a new cache")
    cache.layers[layer] = HybridCacheLayer()
    return cache.layers[layer]
