// Vector registers and small matrices of float32 that stay in a thread's cache: their products, copies and transposes; and
// sine, cosine and exponential of a vector. Rows may be filled up to whole vectors.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

namespace {

// A block of a product has kBlock × 2 vectors of sums, as many as there are registers for.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kBlock = 14;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kBlock = 6;
#else
constexpr int kLanes = 4, kBlock = 6;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int Integers __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector vector) { *reinterpret_cast<Unaligned*>(to) = vector; }
inline Vector select(Integers condition, Vector yes, Vector no) { return condition ? yes : no; }

// The first elements of a vector. The rest is loaded as 0.
inline Vector load_some(const float* from, int64_t size) {
  if (size >= kLanes) return load(from);
#ifdef __AVX512F__
  return _mm512_maskz_loadu_ps((1u << size) - 1, from);
#else
  Vector vector = {};
  std::memcpy(&vector, from, size * sizeof(float));
  return vector;
#endif
}

inline void store_some(float* to, Vector vector, int64_t size) {
  if (size >= kLanes) return store(to, vector);
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(to, (1u << size) - 1, vector);
#else
  std::memcpy(to, &vector, size * sizeof(float));
#endif
}

int64_t whole_vectors(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// ---- Matrices ----

struct Floats {  // zeros
  explicit Floats(int64_t size)
        : size(size),
          data(static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 64) / 64 * 64)), std::free) {
    clear();
  }
  void scale(float factor) {
    for (int64_t i = 0; i < size; i++) data.get()[i] *= factor;
  }
  void clear() { std::fill_n(data.get(), size, 0.0f); }
  operator float*() const { return data.get(); }

  int64_t size;
  std::unique_ptr<float, void (*)(void*)> data;
};

// Elements with the distances from one row, and from one column, to the next.
struct Matrix {
  Matrix transposed() const { return {at, column, row}; }

  const float* at;
  int64_t row, column;
};

// Swaps in each square of 2 · SIDE lanes of a square of vectors the two squares off its diagonal.
template <int SIDE>
inline void swap_squares(Vector* square) {
  Integers low, high;
  for (int lane = 0; lane < kLanes; lane++) {
    low[lane] = lane & SIDE ? lane - SIDE + kLanes : lane;
    high[lane] = lane & SIDE ? lane + kLanes : lane + SIDE;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++)
    if (!(i & SIDE)) {
      Vector above = square[i], below = square[i + SIDE];
      square[i] = __builtin_shuffle(above, below, low);
      square[i + SIDE] = __builtin_shuffle(above, below, high);
    }
  if constexpr (SIDE > 1) swap_squares<SIDE / 2>(square);
}

// (rows, columns) to (columns, rows), times a factor; each with the distance of its rows. It adds zeros to whole vectors.
void transpose(
    const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row, float factor = 1) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vector square[kLanes];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; lane++)
        square[lane] = i + lane < rows ? factor * load_some(from + (i + lane) * from_row + j, columns - j) : Vector{};
      swap_squares<kLanes / 2>(square);
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; lane++)
        if (j + lane < columns) store(to + (j + lane) * to_row + i, square[lane]);
    }
}

// Copies rows and adds zeros to whole vectors.
void copy(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j += kLanes)
      store(to + i * to_row + j, load_some(from + i * from_row + j, columns - j));
}

// Copies rows, times a factor, without what fills them up to whole vectors.
void copy_out(
    const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row, float factor = 1) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j += kLanes)
      store_some(to + i * to_row + j, factor * load(from + i * from_row + j), columns - j);
}

// c_ij = Σ_k a_ik b_kj, or with `keep` c_ij plus that, for I rows and J vectors of columns.
template <int I, int J>
void multiply_block(int64_t depth, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, bool keep) {
  Vector sums[I][J];
#pragma GCC unroll 16
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int j = 0; j < J; j++) sums[i][j] = keep ? load(c + i * c_row + j * kLanes) : Vector{};
  // One pointer for three rows: an address may have the distance of rows once or twice in it.
  const float* rows[(I + 2) / 3];
#pragma GCC unroll 16
  for (int i = 0; i < I; i += 3) rows[i / 3] = a.at + i * a.row;
  for (int64_t k = 0; k < depth; k++) {
    Vector right[J];
#pragma GCC unroll 2
    for (int j = 0; j < J; j++) right[j] = load(b + k * b_row + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < I; i++)
#pragma GCC unroll 2
      for (int j = 0; j < J; j++) sums[i][j] += rows[i / 3][i % 3 * a.row] * right[j];
#pragma GCC unroll 16
    for (int i = 0; i < I; i += 3) rows[i / 3] += a.column;
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; i++)
#pragma GCC unroll 2
    for (int j = 0; j < J; j++) store(c + i * c_row + j * kLanes, sums[i][j]);
}

using Block = void (*)(int64_t, Matrix, const float*, int64_t, float*, int64_t, bool);

template <int J, int... I>
constexpr std::array<Block, kBlock> blocks(std::integer_sequence<int, I...>) {
  return {multiply_block<I + 1, J>...};
}

// The same for any number of rows, in blocks of nearly the same size, and of whole vectors of columns.
void multiply(
    int64_t rows, int64_t columns, int64_t depth, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool keep) {
  static constexpr auto wide = blocks<2>(std::make_integer_sequence<int, kBlock>());
  static constexpr auto narrow = blocks<1>(std::make_integer_sequence<int, kBlock>());
  int64_t count = (rows + kBlock - 1) / kBlock;
  for (int64_t block = 0; block < count; block++) {
    int64_t start = rows * block / count, size = rows * (block + 1) / count - start;
    Matrix part = {a.at + start * a.row, a.row, a.column};
    float* to = c + start * c_row;
    int64_t j = 0;
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes) wide[size - 1](depth, part, b + j, b_row, to + j, c_row, keep);
    if (j < columns) narrow[size - 1](depth, part, b + j, b_row, to + j, c_row, keep);
  }
}

// ---- Functions ----

constexpr float kRound = 12582912;  // added to a float and subtracted again, it rounds to the nearest whole number
constexpr float kReducible = 4096;  // up to here multiples of π/2 are subtracted without an error

inline Vector absolute(Vector x) { return (Vector)((Integers)x & 0x7fffffff); }

// Reduces x, of |x| ≤ kReducible, to ±π/4 and evaluates both polynomials, those of Cephes' sinf and cosf. π/2 has three
// parts: the first two have so few bits that their multiples are exact.
inline void cosine_and_sine(Vector x, Vector& cosine, Vector& sine) {
  Vector turns = x * 0.636619772f + kRound;
  Integers quadrant = (Integers)turns;
  turns -= kRound;
  x -= turns * 1.5703125f;
  x -= turns * 4.837512969970703125e-4f;
  x -= turns * 7.54978995489188216e-8f;
  Vector square = x * x;
  Vector odd = x + x * square * (-1.6666654611e-1f + square * (8.3321608736e-3f + square * -1.9515295891e-4f));
  Vector even =
      1 - 0.5f * square +
      square * square * (4.166664568298827e-2f + square * (-1.388731625493765e-3f + square * 2.443315711809948e-5f));
  Integers swap = (quadrant & 1) != 0;
  constexpr int kSign = 1 << 31;
  Integers second_bit = quadrant << 30;
  sine = (Vector)((Integers)select(swap, even, odd) ^ (second_bit & kSign));
  cosine = (Vector)((Integers)select(swap, odd, even) ^ ((second_bit + (1 << 30)) & kSign));
}

// e^x for x ≤ 0, and 0 below −87: 2^n e^y with n whole and |y| ≤ ln 2 / 2, by the polynomial of Cephes' expf.
inline Vector exponential(Vector x) {
  Integers vanishes = x < -87;
  x = select(vanishes, Vector{} - 87, x);
  Vector whole = x * 1.44269504f + kRound;
  Integers exponent = (Integers)whole << 23;
  whole -= kRound;
  x -= whole * 0.693359375f;
  x -= whole * -2.12194440e-4f;
  Vector y = 1.9875691500e-4f + Vector{};
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * x + c;
  y = y * x * x + x + 1;
  return select(vanishes, Vector{}, (Vector)((Integers)y + exponent));
}

}  // namespace
