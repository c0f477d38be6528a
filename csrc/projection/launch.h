// The interface between api.cpp and the kernels.
#pragma once

#include "projection/params.h"

namespace fastgen::projection {

int multiprocessors();

// ``stream`` is a cudaStream_t. Launchers do not synchronize. Sizes must not be 0.
void launch_project(ProjectParams params, DType dtype, void* stream);
void launch_weight_gradient(WeightGradientParams params, DType dtype, void* stream);
void launch_reduce(const ReduceParams& params, DType dtype, void* stream);
void launch_heads_backward(const HeadBackwardParams& params, DType dtype, void* stream);
// out = gate * weight, row by row; out is contiguous.
void launch_scale_rows(const void* weight, int64_t weight_row, const Vector& gate, void* out, int rows, int columns,
                       DType dtype, void* stream);
// out = column sums of (rows, columns).
void launch_sum_rows(const float* parts, int rows, int columns, void* out, DType dtype, void* stream);

}  // namespace fastgen::projection
