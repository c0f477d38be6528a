// Operator cpu_dropout_keep: the dropout factors of one tile of fastgen/ops/attention/blocked.py.
#include "attention/cpu/dropout.h"
#include "common/operand_checks.h"
#include "common/philox.h"

namespace fastgen::cpu {
namespace {

// [first, first + count) must be within [0, size).
void check_range(int64_t first, int64_t count, int64_t size, const char* name) {
  STD_TORCH_CHECK(first >= 0 && count >= 0 && first <= size && count <= size - first, name,
                  ": expected ranges within the problem, 0 to ", size, ", got ", count, " from ", first, " on");
}

Tensor keep(const Tensor& seed, int64_t rows_per_seed, int64_t first_batch, int64_t batches, int64_t heads,
            int64_t length, int64_t first_query, int64_t queries, int64_t keys, int64_t first_key, int64_t last_key,
            double p) {
  check_seed(seed, 0, seed);
  check_probability(p, "p");
  STD_TORCH_CHECK(rows_per_seed > 0, "rows_per_seed: expected at least 1, got ", rows_per_seed);
  const int64_t most = checked_product({seed.numel(), rows_per_seed}, "rows_per_seed");
  // The Philox counters, one for four keys of each row, must fit as well.
  checked_product({rows_per_seed, keys / kGroup + 1}, "keys");
  check_range(first_batch, batches, most, "first_batch, batches");
  check_range(first_query, queries, length, "first_query, queries");
  STD_TORCH_CHECK(first_key >= 0 && first_key <= last_key,
                  "first_key, last_key: expected 0 <= first_key <= last_key, got ", first_key, " and ", last_key);
  check_range(first_key, last_key - first_key, keys, "first_key, last_key");
  STD_TORCH_CHECK(checked_product({first_batch + batches, heads, length}, "batches") <= most,
                  "batches: expected ranges within the problem, the ", most, " rows of all seeds");
  Tensor result = torch::stable::new_empty(seed, {batches, heads, queries, last_key - first_key}, ScalarType::Float);
  if (result.numel() == 0) return result;
  dropout_keep({seed.const_data_ptr<int64_t>(), rows_per_seed, first_batch, batches, heads, length, first_query,
                queries, keys, first_key, last_key, static_cast<float>(p), 1.0f / static_cast<float>(1.0 - p),
                static_cast<float*>(result.mutable_data_ptr())});
  return result;
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) { m.impl("cpu_dropout_keep", TORCH_BOX(&keep)); }

}  // namespace fastgen::cpu
