// Addresses of matrix elements.
#pragma once

#include "projection/params.h"

namespace fastgen::projection {

template <typename T>
__device__ __forceinline__ T* address(const Matrix& matrix, int batch, int token, int channel) {
  int i = 0;
  while (i + 1 < matrix.count && channel >= matrix.parts[i + 1].first) ++i;
  const Part& part = matrix.parts[i];
  const int within = channel - part.first;
  int64_t offset = batch * part.batch + token * part.token;
  if (part.head == part.dim * matrix.channel) {  // contiguous heads
    offset += within * matrix.channel;
  } else {
    const int head = within / part.dim;
    offset += head * part.head + (within - head * part.dim) * matrix.channel;
  }
  return static_cast<T*>(part.data) + offset;
}

template <typename T>
__device__ __forceinline__ const T* element(const Vector& vector, int batch, int channel) {
  return static_cast<const T*>(vector.data) + batch * vector.batch + channel * vector.channel;
}

// Batch entry and position of a token.
struct Place {
  int sequence, position;

  __device__ __forceinline__ Place(const Tokens& tokens, int batch, int token)
      : sequence(batch + token / tokens.period), position(token % tokens.period) {}
};

}  // namespace fastgen::projection
