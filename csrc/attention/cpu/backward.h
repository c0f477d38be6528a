// Gradients of the fused float32 attention on the CPU; see forward.h.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

struct AttentionBackwardParams {
  const float *query, *key, *value, *out, *grad_out;  // last dims contiguous
  int64_t query_strides[3], key_strides[3], value_strides[3], out_strides[3], grad_out_strides[3];
  const float *lse, *grad_lse;  // (B, H, N); grad_lse may be null
  int64_t lse_strides[3], grad_lse_strides[3];
  float *grad_query, *grad_key, *grad_value;  // like query, key, value
  int64_t grad_query_strides[3], grad_key_strides[3], grad_value_strides[3];
  int64_t batch, heads, key_heads, queries, keys, key_dim, value_dim;
  bool is_causal;
  float scale;
};

// Supports the same head dims as attention_forward. Results do not depend on the number of threads.
void attention_backward(const AttentionBackwardParams& params);

}  // namespace fastgen::cpu
