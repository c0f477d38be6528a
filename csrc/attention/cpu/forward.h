// Fused float32 attention on the CPU, for key and value dims that differ: torch's fused kernel requires equal head
// dims, and padding the narrower one costs as much arithmetic as the fusion saves.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

struct AttentionParams {
  const float *query, *key, *value;                            // last dims contiguous
  int64_t query_strides[3], key_strides[3], value_strides[3];  // batch, head, row; in elements
  float* out;                                                  // (B, H, N, Dv) with out_strides
  int64_t out_strides[3];
  float* lse;  // (B, N, H), contiguous
  int64_t batch, heads, key_heads, queries, keys, key_dim, value_dim;
  bool is_causal;
  float scale;
};

// Largest supported head dims; value_dim must be a multiple of kValueStep.
constexpr int64_t kMaxKeyDim = 64, kMaxValueDim = 256, kValueStep = 16;

// Requires keys > 0. Parallel over blocks of query rows.
void attention_forward(const AttentionParams& params);

}  // namespace fastgen::cpu
