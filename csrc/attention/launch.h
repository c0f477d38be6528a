// The seam between api.cpp and the kernels.
#pragma once

#include "attention/params.h"

namespace fastgen::attention {

// ``stream`` is a cudaStream_t. None of these synchronises. The problem has queries and heads; keys may be none.
void launch_forward(const ForwardParams& params, DType dtype, void* stream);
void launch_backward(const BackwardParams& params, DType dtype, void* stream);
// After launch_backward, whose delta it reads.
void launch_mask_gradient(const BackwardParams& params, const MaskGradient& gradient, DType dtype, void* stream);

void launch_tangent(const TangentParams& params, DType dtype, void* stream);
void launch_second_order(const SecondOrderParams& params, DType dtype, void* stream);
// After launch_second_order, whose deltas it reads.
void launch_mask_second_order(const SecondOrderParams& params, const MaskGradient& gradient, DType dtype, void* stream);

// Into how many parts the mask's gradient is summed. Twice: of second order.
int mask_splits(const Problem& problem, const int (&mask)[4], DType dtype, bool twice);

}  // namespace fastgen::attention
