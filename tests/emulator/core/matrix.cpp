// Matrix instructions: which lane holds which element (PTX ISA, "Matrix fragments for mma.m16n8k16", "... m16n8k8",
// "ldmatrix", "stmatrix"), and what they compute.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>

#include "common/cpu/convert.h"
#include "core/engine.h"
#include "core/matrix.h"

namespace fastgen::emulator {

namespace {

constexpr int kM = kFragmentRows, kN = kFragmentColumns, kMostK = kFragmentDepth, kRows = 8, kRowBytes = 16;

struct Position {
  int row, column;
};

// Element i (0 or 1) of a lane's register of an 8x8 matrix.
constexpr Position tile_element(int lane, int i) { return {lane / 4, lane % 4 * 2 + i}; }

// 16-bit elements: A is 16x16 in 8 elements a lane, two a register; B is 16x8 in 4.
constexpr Position a_half(int lane, int i) { return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8}; }
constexpr Position b_half(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }
// tf32: A is 16x8 in 4 elements a lane, one a register; B is 8x8 in 2.
constexpr Position a_tf32(int lane, int i) { return {lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4}; }
constexpr Position b_tf32(int lane, int i) { return {lane % 4 + i * 4, lane / 4}; }
// C and D are 16x8 in 4 float32 a lane.
constexpr Position d_float(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

struct MatrixLane {
  uint32_t* registers;
  char* row;
  int matrices;
  bool transposed;
};

void run_move(Meeting& meeting, bool load) {
  MatrixLane* lanes[32];
  for (int lane = 0; lane < 32; ++lane) lanes[lane] = static_cast<MatrixLane*>(meeting.lanes[lane]);
  for (int matrix = 0; matrix < lanes[0]->matrices; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 2; ++i) {
        Position at = tile_element(lane, i);
        if (lanes[0]->transposed) std::swap(at.row, at.column);
        char* element = lanes[matrix * kRows + at.row]->row + at.column * 2;
        char* half = reinterpret_cast<char*>(&lanes[lane]->registers[matrix]) + i * 2;
        load ? memcpy(half, element, 2) : memcpy(element, half, 2);
      }
    }
  }
}

struct MultiplyLane {
  Element element;
  float* d;
  const uint32_t *a, *b;
};

template <Element kElement>
float element_of(const uint32_t* registers, int i) {
  if constexpr (kElement == Element::kTFloat32) {
    return bits_to_float(registers[i] & 0xffffe000u);  // the low 13 bits are ignored
  } else {
    return to_float(kElement, static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2)));
  }
}

constexpr int kFraction = 23;  // bits of a float's significand after the first

// d += a b, column by column, with one rounding to nearest at the end.
template <int kK>
void add_exact(double (&d)[kN], const float (&a)[kMostK], const float (&b)[kMostK][kN]) {
  for (int k = 0; k < kK; ++k) {
    for (int column = 0; column < kN; ++column) d[column] += double{a[k]} * b[k][column];
  }
  for (double& sum : d) sum = static_cast<float>(sum);
}

// A power of two.
double power(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A float between the exact value and zero.
float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(double{nearest}) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// The same in blocks of products, aligned and truncated: MatrixRounding. Of each block the terms are multiples of a
// unit that depends on the largest one.
void add_truncated(double (&d)[kN], const float (&a)[kMostK], const float (&b)[kMostK][kN], const int* order,
                   int products, const MatrixRounding& rounding) {
  for (int first = 0; first < products; first += rounding.width) {
    const int width = std::min(rounding.width, products - first);
    double terms[kMostK + 1][kN], largest[kN] = {};
    for (int i = 0; i <= width; ++i) {
      for (int column = 0; column < kN; ++column) {
        const int k = i < width ? order[first + i] : 0;
        terms[i][column] = i < width ? double{a[k]} * b[k][column] : d[column];
        const double size = std::fabs(terms[i][column]);
        largest[column] = size > largest[column] || size != size ? size : largest[column];
      }
    }
    for (int column = 0; column < kN; ++column) {
      double exact = 0.0;
      int32_t sum = 0;
      const bool finite = largest[column] <= std::numeric_limits<double>::max();
      constexpr int kLeast = std::numeric_limits<float>::min_exponent - 1;
      const int exponent = finite && largest[column] > 0.0 ? std::max(std::ilogb(largest[column]), kLeast) : kLeast;
      const double unit = power(exponent - kFraction - rounding.extra_bits), inverse = 1.0 / unit;
      for (int i = 0; i <= width; ++i) {
        if (finite) sum += static_cast<int32_t>(terms[i][column] * inverse);
        exact += terms[i][column];
      }
      d[column] = finite ? double{toward_zero(sum * unit)} : static_cast<float>(exact);
    }
  }
}

template <int kK>
void add_fragments(double (&d)[kM][kN], const float (&a)[kM][kMostK], const float (&b)[kMostK][kN]) {
  MatrixRounding rounding = Engine::get().options.rounding;
  if (kK == 8 && rounding.width > 4) rounding.width /= 2;  // tf32: blocks of as many bytes
  int order[kMostK];
  std::iota(order, order + kMostK, 0);
  if (rounding.order != 0) std::shuffle(order, order + kK, std::minstd_rand(rounding.order));
  for (int row = 0; row < kM; ++row) {
    if (rounding.width == 0) {
      add_exact<kK>(d[row], a[row], b);
    } else {
      add_truncated(d[row], a[row], b, order, kK, rounding);
    }
  }
}

template <Element kElement>
void run_multiply(Meeting& meeting) {
  constexpr bool kTf32 = kElement == Element::kTFloat32;
  constexpr int kK = kTf32 ? 8 : 16, kAElements = kTf32 ? 4 : 8, kBElements = kTf32 ? 2 : 4;
  float a[kM][kMostK], b[kMostK][kN];
  double d[kM][kN];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MultiplyLane*>(meeting.lanes[lane]);
    for (int i = 0; i < kAElements; ++i) {
      const Position at = kTf32 ? a_tf32(lane, i) : a_half(lane, i);
      a[at.row][at.column] = element_of<kElement>(mine.a, i);
    }
    for (int i = 0; i < kBElements; ++i) {
      const Position at = kTf32 ? b_tf32(lane, i) : b_half(lane, i);
      b[at.row][at.column] = element_of<kElement>(mine.b, i);
    }
    for (int i = 0; i < 4; ++i) d[d_float(lane, i).row][d_float(lane, i).column] = mine.d[i];
  }
  add_fragments<kK>(d, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MultiplyLane*>(meeting.lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      mine.d[i] = static_cast<float>(d[d_float(lane, i).row][d_float(lane, i).column]);
    }
  }
}

constexpr WarpInstruction kLoad = {"ldmatrix", true, true, [](Meeting& meeting) { run_move(meeting, true); }};
constexpr WarpInstruction kStore = {"stmatrix", true, true, [](Meeting& meeting) { run_move(meeting, false); }};
constexpr WarpInstruction kMultiply[] = {
    {"mma.m16n8k16.f16", true, true, run_multiply<Element::kFloat16>},
    {"mma.m16n8k16.bf16", true, true, run_multiply<Element::kBFloat16>},
    {"mma.m16n8k8.tf32", true, true, run_multiply<Element::kTFloat32>},
};
constexpr uint32_t kWholeWarp = 0xffffffffu;

void move(const WarpInstruction& instruction, Touch touch, void* row, uint32_t* registers, int matrices,
          bool transposed, Site site, const Where& where) {
  Engine& engine = Engine::get();
  if (running->lane == 0) ++engine.counters->matrix_loads;
  if (running->lane < matrices * kRows) {  // the other lanes' addresses are not used
    engine.maybe_preempt();
    if (reinterpret_cast<uintptr_t>(row) % kRowBytes != 0) {
      engine.fail(kind::kMisaligned,
                  std::string(instruction.name) + ": a row of a matrix lies at a multiple of 16 bytes", site);
    }
    const size_t offset = engine.shared_offset(row, kRowBytes, instruction.name, site);
    engine.access_shared(offset, kRowBytes, touch, site);
    if (engine.options.checks && engine.options.count_banks) {
      engine.banks.access(running->warp, running->lane, site, offset, kRowBytes);
    }
  }
  MatrixLane mine = {registers, static_cast<char*>(row), matrices, transposed};
  engine.meet(instruction, static_cast<uint64_t>(matrices) * 2 + transposed, kWholeWarp, &mine, where, site);
}

}  // namespace

float to_float(Element element, uint16_t bits) {
  return element == Element::kFloat16 ? cpu::to_float(Half{bits}) : cpu::to_float(BFloat16{bits});
}

void add_products(double (&d)[kM][kN], const float (&a)[kM][kMostK], const float (&b)[kMostK][kN]) {
  add_fragments<kMostK>(d, a, b);
}

void load_matrices(uint32_t* registers, const void* row, int matrices, bool transposed, Where where) {
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  move(kLoad, Touch::kRead, const_cast<void*>(row), registers, matrices, transposed, site, where);
}

void store_matrices(void* row, const uint32_t* registers, int matrices, bool transposed, Where where) {
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  move(kStore, Touch::kWrite, row, const_cast<uint32_t*>(registers), matrices, transposed, site, where);
}

void multiply(Element element, float* d, const uint32_t* a, const uint32_t* b, Where where) {
  Engine& engine = Engine::get();
  const auto site = reinterpret_cast<Site>(__builtin_return_address(0));
  for (int i = 0; i < 4; ++i) engine.check_register(float_to_bits(d[i]), "an accumulator", site);
  for (int i = 0; i < 4; ++i) engine.check_register(a[i], "a left operand", site);
  for (int i = 0; i < 2; ++i) engine.check_register(b[i], "a right operand", site);
  if (running->lane == 0) ++engine.counters->matrix_products;
  MultiplyLane mine = {element, d, a, b};
  engine.meet(kMultiply[static_cast<int>(element)], 0, kWholeWarp, &mine, where, site);
}

MatrixRounding matrix_rounding(const std::string& name, uint64_t seed) {
  // V100, A100 and H100, for 16-bit elements.
  constexpr MatrixRounding kMeasured[] = {{4, 0}, {8, 1}, {16, 2}};
  if (name == "nearest") return {};
  if (name == "volta") return kMeasured[0];
  if (name == "ampere") return kMeasured[1];
  if (name == "hopper") return kMeasured[2];
  if (name != "any") {
    throw std::invalid_argument("rounding: expected nearest, volta, ampere, hopper or any, got " + name);
  }
  std::mt19937_64 random(seed);
  MatrixRounding chosen = kMeasured[random() % 3];
  chosen.order = random() % 2 == 0 ? 0 : random() | 1;
  return chosen;
}

}  // namespace fastgen::emulator
