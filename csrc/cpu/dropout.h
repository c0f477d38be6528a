// Which weights of attention dropout keeps, for a tile of scores: the same bits as fastgen/reference.py, uniform_rows.
#pragma once

#include <cstdint>

namespace fastgen::cpu {

// Rows are (batch, head, query) of a range of the batch and of the queries, all heads; columns a range of the keys.
struct DropoutParams {
  const int64_t* seeds;  // one for every rows_per_seed rows of the whole problem
  int64_t rows_per_seed;
  int64_t first_batch, batches, heads, length, first_query, queries;
  int64_t keys, first_key, last_key;
  float p, factor;  // of what stays: 1 / (1 - p)
  float* keep;      // (batches, heads, queries, last_key - first_key): factor, or 0
};

void dropout_keep(const DropoutParams& params);

}  // namespace fastgen::cpu
