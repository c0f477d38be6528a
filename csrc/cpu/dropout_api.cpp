// cpu_dropout_keep as an operator: what a tile of ops/_attention_blocked.py multiplies its weights with.
#include "common/torch_api.h"
#include "cpu/dropout.h"

namespace fastgen::cpu {
namespace {

Tensor keep(const Tensor& seed, int64_t rows_per_seed, int64_t first_batch, int64_t batches, int64_t heads,
            int64_t length, int64_t first_query, int64_t queries, int64_t keys, int64_t first_key, int64_t last_key,
            double p) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.dim() == 1 && seed.is_contiguous() && seed.numel() > 0,
                  "seed: expected a contiguous int64 vector");
  const int64_t most = seed.numel() * rows_per_seed;
  STD_TORCH_CHECK(rows_per_seed > 0 && first_batch >= 0 && (first_batch + batches) * heads * length <= most &&
                      first_query >= 0 && first_query + queries <= length && first_key >= 0 && first_key <= last_key &&
                      last_key <= keys,
                  "expected ranges within the problem");
  Tensor result = torch::stable::new_empty(seed, {batches, heads, queries, last_key - first_key}, ScalarType::Float);
  dropout_keep({seed.const_data_ptr<int64_t>(), rows_per_seed, first_batch, batches, heads, length, first_query,
                queries, keys, first_key, last_key, static_cast<float>(p), 1.0f / static_cast<float>(1.0 - p),
                static_cast<float*>(result.mutable_data_ptr())});
  return result;
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) { m.impl("cpu_dropout_keep", TORCH_BOX(&keep)); }

}  // namespace fastgen::cpu
