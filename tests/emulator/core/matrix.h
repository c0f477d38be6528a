// Products of fragments of 16-bit elements, as the matrix instructions add them: MatrixRounding in control.h.
#pragma once

#include "core/emulator.h"

namespace fastgen::emulator {

constexpr int kFragmentRows = 16, kFragmentColumns = 8, kFragmentDepth = 16;

// ``element``: kFloat16 or kBFloat16.
float to_float(Element element, uint16_t bits);

// d += a b. The sums are float32.
void add_products(double (&d)[kFragmentRows][kFragmentColumns], const float (&a)[kFragmentRows][kFragmentDepth],
                  const float (&b)[kFragmentDepth][kFragmentColumns]);

}  // namespace fastgen::emulator
