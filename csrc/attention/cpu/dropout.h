// Dropout factors of a tile of scores: the same bits as the PyTorch implementation.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

// Rows: (batch, head, query) over a range of the batch, all heads and a range of the queries; columns: a range of keys.
struct DropoutParams {
  const int64_t* seeds;  // one per rows_per_seed rows of the whole problem
  int64_t rows_per_seed;
  int64_t first_batch, batches, heads, length, first_query, queries;
  int64_t keys, first_key, last_key;
  float p, factor;  // of kept weights: 1 / (1 - p)
  float* keep;      // (batches, heads, queries, last_key - first_key): factor, or 0
};

void dropout_keep(const DropoutParams& params);

// The factors of one row of the whole problem, ``last_key - first_key`` of them; reads the seeds, the keys and p.
void dropout_keep_row(const DropoutParams& params, int64_t row, float* keep);

}  // namespace fastgen::cpu
