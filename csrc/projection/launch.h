// The seam between api.cpp and the kernels.
#pragma once

#include "projection/params.h"

namespace fastgen::projection {

int multiprocessors();

// ``stream`` is a cudaStream_t. None of these synchronises. Every size is at least 1, but for a step's depth.
void launch_project(ProjectParams params, DType dtype, void* stream);
void launch_weight_gradient(WeightGradientParams params, DType dtype, void* stream);
void launch_finish(const FinishParams& params, DType dtype, void* stream);
void launch_heads_backward(const HeadBackwardParams& params, DType dtype, void* stream);
// out = weight, each of ``rows`` rows times its gate; contiguous.
void launch_scale_rows(const void* weight, int64_t weight_row, const Vector& gate, void* out, int rows, int columns,
                       DType dtype, void* stream);
// out = the sums over the rows of (rows, columns).
void launch_sum_rows(const float* parts, int rows, int columns, void* out, DType dtype, void* stream);

}  // namespace fastgen::projection
