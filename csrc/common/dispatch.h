// Dispatch of run-time values to template arguments.
#pragma once

#include <type_traits>

#include "common/types.h"

namespace fastgen {

template <typename Body>
void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(std::type_identity<float>{});
    case DType::kFloat16: return body(std::type_identity<Half>{});
    case DType::kBFloat16: return body(std::type_identity<BFloat16>{});
  }
}

template <typename Body>
void dispatch_bool(bool value, Body&& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

}  // namespace fastgen
