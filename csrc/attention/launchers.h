// The launchers of one storage type: defined in *launch.cuh, instantiated in instantiations/, in files that compile in
// parallel. Declarations only: an inline function that calls them, where their definitions are seen, would instantiate
// every kernel of every type in every file.
#pragma once

#include "attention/params.h"

namespace fastgen::attention {

// ``stream`` is a cudaStream_t. Launchers do not synchronize. Queries and heads must not be empty; keys may be.
template <typename T>
void launch_forward(ForwardParams params, void* stream);
// Of problems whose plan is wide. Half and BFloat16.
template <typename T>
void launch_forward_wide(ForwardParams params, void* stream);
template <typename T>
int64_t wide_forward_workspace(const Problem& problem);
template <typename T>
void launch_backward_query_wide(BackwardParams params, void* stream);
template <typename T>
void launch_backward_key_value_wide(BackwardParams params, void* stream);
// The part of launch_forward for few queries against many keys, and the floats of ForwardParams::parts that it needs.
template <typename T>
void launch_decode(ForwardParams params, void* stream);
template <typename T>
int64_t decode_workspace(const Problem& problem);
// Two halves of the backward pass, in this order: the first one writes delta, which the second one reads, as does
// launch_mask_gradient.
template <typename T>
void launch_backward_query(BackwardParams params, void* stream);
template <typename T>
void launch_backward_key_value(BackwardParams params, void* stream);
template <typename T>
void launch_mask_gradient(const BackwardParams& params, const MaskGradient& gradient, void* stream);
// The whole backward pass in one kernel (one_tile.h, one_head.h); false, with nothing launched, if none takes it.
template <typename T>
bool launch_one_tile(const BackwardParams& params, void* stream);
// The same with the gradient of the mask, if one_tile_splits is not 0.
template <typename T>
void launch_one_tile_mask(const BackwardParams& params, const MaskGradient& gradient, void* stream);

template <typename T>
void launch_tangent(TangentParams params, void* stream);
// The parts of launch_tangent, launch_second_order_* and launch_mask_second_order for wide heads.
template <typename T>
void launch_tangent_wide(TangentParams params, void* stream);
template <typename T>
void launch_second_order_query_wide(SecondOrderParams params, void* stream);
template <typename T>
void launch_second_order_key_value_wide(SecondOrderParams params, void* stream);
template <typename T>
void launch_mask_second_order_wide(SecondOrderParams params, const MaskGradient& gradient, void* stream);
// Two halves, in this order: the first one writes the deltas that the second one and launch_mask_second_order read.
template <typename T>
void launch_second_order_query(SecondOrderParams params, void* stream);
template <typename T>
void launch_second_order_key_value(SecondOrderParams params, void* stream);
template <typename T>
void launch_mask_second_order(const SecondOrderParams& params, const MaskGradient& gradient, void* stream);

// The number of partial sums of the gradient of a mask.
template <typename T>
int mask_splits(const Problem& problem, const int (&mask)[4]);
template <typename T>
int one_tile_splits(const Problem& problem, const int (&mask)[4]);
template <typename T>
int mask_second_order_splits(const Problem& problem, const int (&mask)[4]);

}  // namespace fastgen::attention
