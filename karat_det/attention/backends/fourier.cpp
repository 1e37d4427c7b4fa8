// Sums of Fourier series over attention scores that are never in memory, for the CPU, in float32.
//
// With scores A = scale · Q Kᵀ + bias, (N, M) for each item of a batch and each head, the operator needs for p = 1..r
//
//     S_kp = Σ_q Σ_m a_pqm cos(m A_kq) + b_pqm sin(m A_kq),
//
// and residual softmax also softmax(A) V. From dS, the gradient of S, the backward pass forms
//
//     dA_kq = Σ_m m (cos(m A_kq) Σ_p b_pqm dS_kp − sin(m A_kq) Σ_p a_pqm dS_kp),
//     dQ = scale · dA K,   dK = scale · dAᵀ Q,   da_pqm = Σ_k cos(m A_kq) dS_kp,   db_pqm = Σ_k sin(m A_kq) dS_kp.
//
// A thread works on a tile of scores: at most kRows queries and kKeys keys of one item and head, which stay in its cache.
// A tile is transposed, keys × queries, so that a vector register holds queries. Scores, sines and cosines are formed
// again in the backward pass. Where a query does not see a key, cosine and sine are 0, and so is the score's gradient.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using std::optional;

// A block of a product has kBlock × 2 vectors of sums, as many as there are registers for.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kBlock = 14;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kBlock = 6;
#else
constexpr int kLanes = 4, kBlock = 6;
#endif
#ifndef KARAT_ROWS
#define KARAT_ROWS 64
#define KARAT_KEYS 56
#endif
constexpr int64_t kRows = KARAT_ROWS, kKeys = KARAT_KEYS;  // the scores, sines and cosines of a tile take 3 · 14 KiB

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
      : data(static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 64) / 64 * 64)), std::free) {
    std::fill_n(data.get(), size, 0.0f);
  }
  operator float*() const { return data.get(); }
  std::unique_ptr<float, void (*)(void*)> data;
};

// Elements with the distances from one row, and from one column, to the next.
struct Matrix {
  const float* at;
  int64_t row, column;
};

// A matrix for each item of a batch and each head. What all share has the distance 0.
template <typename T>
struct Matrices {
  Matrices() = default;
  explicit Matrices(const optional<Tensor>& tensor) {
    if (!tensor) return;
    start = tensor->const_data_ptr<T>();
    auto distance = [&](int64_t d) { return tensor->size(d) > 1 ? tensor->stride(d) : 0; };
    item = distance(0), head = distance(1), row = distance(2), column = distance(3);
  }
  explicit operator bool() const { return start; }
  const T* at(int64_t i, int64_t h) const { return start + i * item + h * head; }

  const T* start = nullptr;
  int64_t item = 0, head = 0, row = 0, column = 0;
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
    for (int64_t j = 0; j < columns; j += kLanes) store(to + i * to_row + j, load_some(from + i * from_row + j, columns - j));
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
  Vector even = 1 - 0.5f * square +
      square * square * (4.166664568298827e-2f + square * (-1.388731625493765e-3f + square * 2.443315711809948e-5f));
  Integers swap = (quadrant & 1) != 0;
  sine = (Vector)((Integers)select(swap, even, odd) ^ ((quadrant & 2) << 30));
  cosine = (Vector)((Integers)select(swap, odd, even) ^ (((quadrant + 1) & 2) << 30));
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
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * x + c;
  y = y * x * x + x + 1;
  return select(vanishes, Vector{}, (Vector)((Integers)y + exponent));
}

// ---- Tiles ----

struct Inputs {
  Inputs(
      const Tensor& query, const Tensor& key, const Tensor& coefficients, double scale, const optional<Tensor>& full,
      const optional<Tensor>& vertical, const optional<Tensor>& horizontal, const optional<Tensor>& mask,
      const optional<Tensor>& value)
      : query(query), key(key), full(full), vertical(vertical), horizontal(horizontal), value(value), mask(mask),
        coefficients(coefficients.const_data_ptr<float>()), scale(scale), items(query.size(0)), heads(query.size(1)),
        rows(query.size(2)), keys(key.size(2)), width(query.size(3)), grid_size(coefficients.size(2)),
        rank(coefficients.size(4)), values(value ? value->size(3) : 0), grid_rows(vertical ? vertical->size(3) : 0),
        grid_columns(horizontal ? horizontal->size(3) : 0) {}

  // a_pqm, of kind 0, or b_pqm, of kind 1, from a key on: (M, r).
  Matrix weights(int64_t head, int64_t kind, int64_t m, int64_t first_key) const {
    return {coefficients + (((head * 2 + kind) * grid_size + m - 1) * keys + first_key) * rank, rank, 1};
  }
  int64_t tiles() const { return (rows + kRows - 1) / kRows; }
  int64_t key_blocks() const { return (keys + kKeys - 1) / kKeys; }

  Matrices<float> query, key, full, vertical, horizontal, value;
  Matrices<bool> mask;
  const float* coefficients;  // (heads, 2, G, M, r)
  float scale;
  int64_t items, heads, rows, keys, width, grid_size, rank, values, grid_rows, grid_columns;
};

// The scores of one tile after the other, and their cosines and sines.
class Tile {
 public:
  explicit Tile(const Inputs& in)
      : scores(kKeys * kRows), cosines(kKeys * kRows), sines(kKeys * kRows), visible(kKeys * kRows),
        key_rows(in.keys * whole_vectors(in.width)), in(in), first_cosines(kKeys * kRows), first_sines(kKeys * kRows),
        queries(in.width * kRows), vertical(in.grid_rows * kRows), horizontal(in.grid_columns * kRows) {}

  void go_to(int64_t next_item, int64_t next_head) {
    if (item == next_item && head == next_head) return;
    item = next_item, head = next_head;
    copy(in.key.at(item, head), in.key.row, in.keys, in.width, key_rows, whole_vectors(in.width));
  }

  void go_to_rows(int64_t tile) {
    first_row = tile * kRows;
    rows = std::min<int64_t>(kRows, in.rows - first_row);
    columns = whole_vectors(rows);
    transpose_rows(in.query, in.width, queries, in.scale);
    if (in.vertical) transpose_rows(in.vertical, in.grid_rows, vertical);
    if (in.horizontal) transpose_rows(in.horizontal, in.grid_columns, horizontal);
  }

  // The rows of the tile's queries, (rows, size), to (size, kRows).
  void transpose_rows(const Matrices<float>& from, int64_t size, float* to, float factor = 1) const {
    transpose(rows_of(from), from.row, rows, size, to, kRows, factor);
  }

  const float* rows_of(const Matrices<float>& from) const { return from.at(item, head) + first_row * from.row; }

  // Forms the scores.
  void go_to_keys(int64_t block) {
    first_key = in.keys * block / in.key_blocks();
    keys = in.keys * (block + 1) / in.key_blocks() - first_key;
    if (in.vertical) add_grid();
    if (in.full) add_full();
    int64_t width = whole_vectors(in.width);
    multiply(keys, columns, in.width, {key_rows + first_key * width, width, 1}, queries, kRows, scores, kRows, in.vertical || in.full);
    if (in.mask) see();
  }

  // Forms cos(m A) and sin(m A), for m = 1, 2, … in turn.
  void go_to_harmonic(int64_t m) {
    Integers large = {};
    for_each_vector([&](int64_t place, int64_t) {
      Vector cosine, sine;
      if (m == 1) {
        Vector score = load(scores + place);
        large |= absolute(score) > kReducible;
        cosine_and_sine(score, cosine, sine);
        if (in.mask) cosine *= load(visible + place), sine *= load(visible + place);
        if (in.grid_size > 1) store(first_cosines + place, cosine), store(first_sines + place, sine);
      } else {
        Vector c = load(cosines + place), s = load(sines + place);
        Vector c1 = load(first_cosines + place), s1 = load(first_sines + place);
        cosine = c * c1 - s * s1, sine = s * c1 + c * s1;
      }
      store(cosines + place, cosine), store(sines + place, sine);
    });
    bool any = false;
    for (int lane = 0; lane < kLanes; lane++) any |= large[lane] != 0;
    if (any) reduce_large();
  }

  template <typename Work>
  void for_each_vector(const Work& work) const {
    for (int64_t q = 0; q < keys; q++)
      for (int64_t k = 0; k < columns; k += kLanes) work(q * kRows + k, k);
  }

  int64_t item = -1, head = -1;
  int64_t first_row, rows, columns;  // queries of the tile, and the elements of whole vectors of them
  int64_t first_key, keys;
  Floats scores, cosines, sines, visible;  // (keys, kRows)
  Floats key_rows;  // (M, d in whole vectors)

 private:
  void add_grid() {
    for (int64_t q = 0; q < keys; q++) {
      const float* down = vertical + (first_key + q) / in.grid_columns * kRows;
      const float* across = horizontal + (first_key + q) % in.grid_columns * kRows;
      for (int64_t k = 0; k < columns; k += kLanes) store(scores + q * kRows + k, load(down + k) + load(across + k));
    }
  }

  void add_full() {
    for (int64_t q = 0; q < keys; q++) {
      const float* from = in.full.at(item, head) + (first_key + q) * in.full.row + first_row * in.full.column;
      for (int64_t k = 0; k < columns; k += kLanes) {
        Vector bias = in.full.column ? load_some(from + k, rows - k) : *from + Vector{};
        store(scores + q * kRows + k, in.vertical ? bias + load(scores + q * kRows + k) : bias);
      }
    }
  }

  void see() {
    for (int64_t q = 0; q < keys; q++) {
      const bool* from = in.mask.at(item, head) + (first_key + q) * in.mask.row + first_row * in.mask.column;
      for (int64_t k = 0; k < rows; k++) visible[q * kRows + k] = from[k * in.mask.column];
    }
  }

  void reduce_large() {
    for (int64_t q = 0; q < keys; q++)
      for (int64_t place = q * kRows; place < q * kRows + rows; place++) {
        if (std::abs(scores[place]) <= kReducible) continue;
        float factor = in.mask ? visible[place] : 1.0f;
        cosines[place] = factor * std::cos(scores[place]), sines[place] = factor * std::sin(scores[place]);
        if (in.grid_size > 1) first_cosines[place] = cosines[place], first_sines[place] = sines[place];
      }
  }

  const Inputs& in;
  Floats first_cosines, first_sines;
  Floats queries, vertical, horizontal;  // (d, H or W; kRows)
};

// softmax(A) V for the queries of a tile, as in FlashAttention (arXiv 2205.14135): block by block of keys, where the sums
// so far shrink whenever a query's highest score rises.
class Softmax {
 public:
  explicit Softmax(const Inputs& in)
      : in(in), exponentials(kKeys * kRows), attended(in.values * kRows), attended_rows(kRows * whole_vectors(in.values)),
        highest(kRows), totals(kRows) {}

  void add(const Tile& tile) {
    if (tile.first_key == 0) std::fill_n(highest + 0, kRows, kLowest), std::fill_n(totals + 0, kRows, 0.0f);
    for (int64_t k = 0; k < tile.columns; k += kLanes) {
      Vector before = load(highest + k), now = before;
      for (int64_t q = 0; q < tile.keys; q++) {
        Vector score = seen_score(tile, q * kRows + k);
        now = select(score > now, score, now);
      }
      Vector factor = exponential(before - now), total = load(totals + k) * factor;
      for (int64_t q = 0; q < tile.keys; q++) {
        Vector part = exponential(seen_score(tile, q * kRows + k) - now);
        store(exponentials + q * kRows + k, part);
        total += part;
      }
      store(highest + k, now), store(totals + k, total);
      for (int64_t place = k; tile.first_key && place < in.values * kRows; place += kRows)
        store(attended + place, load(attended + place) * factor);
    }
    Matrix values = {in.value.at(tile.item, tile.head) + tile.first_key * in.value.row, 1, in.value.row};
    multiply(in.values, tile.columns, tile.keys, values, exponentials, kRows, attended, kRows, tile.first_key);
  }

  // Writes softmax(A) V, (rows, v), and log Σ_q exp A_kq.
  void finish(const Tile& tile, float* to, float* log_totals) {
    for (int64_t k = 0; k < tile.columns; k += kLanes) {
      Vector factor = 1 / load(totals + k);
      for (int64_t place = k; place < in.values * kRows; place += kRows) store(attended + place, factor * load(attended + place));
    }
    int64_t width = whole_vectors(in.values);
    transpose(attended, kRows, in.values, tile.rows, attended_rows, width);
    for (int64_t k = 0; k < tile.rows; k++) {
      std::copy_n(attended_rows + k * width, in.values, to + k * in.values);
      log_totals[k] = highest[k] + std::log(totals[k]);
    }
  }

 private:
  static constexpr float kLowest = -1e30f;

  Vector seen_score(const Tile& tile, int64_t place) const {
    Vector score = load(tile.scores + place);
    return in.mask ? select(load(tile.visible + place) != 0, score, Vector{} + 2 * kLowest) : score;
  }

  const Inputs& in;
  Floats exponentials, attended, attended_rows, highest, totals;
};

// S, (B, heads, N, r), and with a value softmax(A) V, (B, heads, N, v), and log Σ_q exp A_kq, (B, heads, N, 1).
std::tuple<Tensor, Tensor, Tensor> fourier_sums(
    const Tensor& query, const Tensor& key, const Tensor& coefficients, double scale, const optional<Tensor>& full,
    const optional<Tensor>& vertical, const optional<Tensor>& horizontal, const optional<Tensor>& mask,
    const optional<Tensor>& value) {
  Inputs in(query, key, coefficients, scale, full, vertical, horizontal, mask, value);
  // Queries follow each other, as in a tile.
  Tensor sums = at::empty({in.items, in.heads, in.rank, in.rows}, query.options());
  Tensor attended = at::empty({in.items, in.heads, value ? in.rows : 0, in.values}, query.options());
  Tensor log_totals = at::empty({in.items, in.heads, value ? in.rows : 0, 1}, query.options());
  float *to_sums = sums.data_ptr<float>(), *to_attended = attended.data_ptr<float>(),
        *to_log_totals = log_totals.data_ptr<float>();

  at::parallel_for(0, in.items * in.heads * in.tiles(), 1, [&](int64_t begin, int64_t end) {
    Tile tile(in);
    Softmax softmax(in);
    Floats tile_sums(in.rank * kRows);
    for (int64_t task = begin; task < end; task++) {
      int64_t place = task / in.tiles();
      tile.go_to(place / in.heads, place % in.heads);
      tile.go_to_rows(task % in.tiles());
      for (int64_t block = 0; block < in.key_blocks(); block++) {
        tile.go_to_keys(block);
        if (value) softmax.add(tile);
        for (int64_t m = 1; m <= in.grid_size; m++) {
          tile.go_to_harmonic(m);
          for (int kind : {0, 1}) {
            Matrix weights = in.weights(tile.head, kind, m, tile.first_key);
            std::swap(weights.row, weights.column);
            multiply(in.rank, tile.columns, tile.keys, weights, kind ? tile.sines : tile.cosines, kRows, tile_sums, kRows, block || m > 1 || kind);
          }
        }
      }
      for (int64_t p = 0; p < in.rank; p++)
        std::copy_n(tile_sums + p * kRows, tile.rows, to_sums + (place * in.rank + p) * in.rows + tile.first_row);
      int64_t row = place * in.rows + tile.first_row;
      if (value) softmax.finish(tile, to_attended + row * in.values, to_log_totals + row);
    }
  });
  return {sums.transpose(2, 3), attended, log_totals};
}

// Sums along the first dimension.
Tensor sum_parts(const Tensor& parts) { return parts.size(0) == 1 ? parts.squeeze(0) : parts.sum(0); }

// The gradients of query, key, coefficients, full, of all heads, vertical, horizontal and value. Those of absent inputs are
// empty, as is that of full without with_full.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fourier_sums_backward(
    const Tensor& sums_gradient, const optional<Tensor>& attended_gradient, const Tensor& query, const Tensor& key,
    const Tensor& coefficients, double scale, const optional<Tensor>& full, const optional<Tensor>& vertical,
    const optional<Tensor>& horizontal, const optional<Tensor>& mask, const optional<Tensor>& value,
    const optional<Tensor>& attended, const optional<Tensor>& log_totals, bool with_full) {
  Inputs in(query, key, coefficients, scale, full, vertical, horizontal, mask, value);
  Matrices<float> units_gradients(sums_gradient), attended_gradients(attended_gradient), attended_rows(attended),
      log_total_rows(log_totals);
  int64_t rank = whole_vectors(in.rank), width = whole_vectors(in.width), values = whole_vectors(in.values);

  // A task adds up the gradients of one head's coefficients. Where heads are few, several tasks share its items, and where
  // items are few, the tiles of each.
  int64_t wanted = (4 * at::get_num_threads() + in.heads - 1) / in.heads;
  int64_t groups = std::clamp<int64_t>(in.items, 1, wanted), parts = std::min(in.tiles(), (wanted + groups - 1) / groups);

  auto options = query.options();
  Tensor query_gradient = at::empty({in.items, in.heads, in.rows, in.width}, options);
  Tensor key_gradients = at::empty({parts, in.items, in.heads, in.keys, in.width}, options);
  Tensor coefficients_gradients = at::zeros({groups * parts, in.heads, 2, in.grid_size, in.keys, rank}, options);
  bool share_full = with_full && full->size(0) == 1;
  Tensor full_gradients = at::zeros({share_full ? groups : in.items, in.heads, in.keys, with_full ? in.rows : 0}, options);
  Tensor vertical_gradient = at::empty({in.items, in.heads, in.rows, in.grid_rows}, options);
  Tensor horizontal_gradient = at::empty({in.items, in.heads, in.rows, in.grid_columns}, options);
  Tensor value_gradients = at::empty({parts, in.items, in.heads, in.keys, in.values}, options);
  float *to_query = query_gradient.data_ptr<float>(), *to_keys = key_gradients.data_ptr<float>(),
        *to_coefficients = coefficients_gradients.data_ptr<float>(), *to_full = full_gradients.data_ptr<float>(),
        *to_vertical = vertical_gradient.data_ptr<float>(), *to_horizontal = horizontal_gradient.data_ptr<float>(),
        *to_values = value_gradients.data_ptr<float>();

  at::parallel_for(0, in.heads * groups * parts, 1, [&](int64_t begin, int64_t end) {
    Tile tile(in);
    // Of the rows of a tile: rows × channels, and channels × rows.
    Floats queries(kRows * width), units(kRows * rank), units_transposed(in.rank * kRows);
    Floats outputs(kRows * values), outputs_transposed(in.values * kRows), attended_transposed(in.values * kRows);
    Floats log_total(kRows), mean(kRows);
    // Of a tile: keys × rows.
    Floats with_sines(kKeys * kRows), with_cosines(kKeys * kRows), softmax(kKeys * kRows), scores(kKeys * kRows);
    // Gradients so far.
    Floats query_rows(kRows * width), key_rows(in.keys * width), value_rows(in.keys * values);
    Floats grid_rows(in.grid_rows * kRows), grid_columns(in.grid_columns * kRows);

    for (int64_t task = begin; task < end; task++) {
      int64_t head = task / (groups * parts), group = task / parts % groups, part = task % parts;
      float* weights = to_coefficients + ((group * parts + part) * in.heads + head) * 2 * in.grid_size * in.keys * rank;
      for (int64_t item = in.items * group / groups; item < in.items * (group + 1) / groups; item++) {
        tile.go_to(item, head);
        std::fill_n(key_rows + 0, in.keys * width, 0.0f);
        std::fill_n(value_rows + 0, in.keys * values, 0.0f);
        for (int64_t t = in.tiles() * part / parts; t < in.tiles() * (part + 1) / parts; t++) {
          tile.go_to_rows(t);
          int64_t rows = tile.rows, columns = tile.columns, row = (item * in.heads + head) * in.rows + tile.first_row;
          copy(tile.rows_of(in.query), in.query.row, rows, in.width, queries, width);
          copy(tile.rows_of(units_gradients), units_gradients.row, rows, in.rank, units, rank);
          tile.transpose_rows(units_gradients, in.rank, units_transposed);
          if (value) {
            copy(tile.rows_of(attended_gradients), attended_gradients.row, rows, in.values, outputs, values);
            tile.transpose_rows(attended_gradients, in.values, outputs_transposed);
            std::copy_n(tile.rows_of(log_total_rows), rows, log_total + 0);
            tile.transpose_rows(attended_rows, in.values, attended_transposed);
            std::fill_n(mean + 0, kRows, 0.0f);
            for (int64_t v = 0; v < in.values; v++)
              for (int64_t k = v * kRows; k < v * kRows + columns; k += kLanes)
                store(mean + k % kRows, load(mean + k % kRows) + load(outputs_transposed + k) * load(attended_transposed + k));
          }
          std::fill_n(grid_rows + 0, in.grid_rows * kRows, 0.0f);
          std::fill_n(grid_columns + 0, in.grid_columns * kRows, 0.0f);

          for (int64_t block = 0; block < in.key_blocks(); block++) {
            tile.go_to_keys(block);
            int64_t first_key = tile.first_key, keys = tile.keys;
            if (value) {
              // With P = softmax(A) and dP = dO Vᵀ, dA = P ∘ (dP − Σ_q P dP), and that sum is dO · O.
              Matrix values_ = {in.value.at(item, head) + first_key * in.value.row, in.value.row, 1};
              multiply(keys, columns, in.values, values_, outputs_transposed, kRows, scores, kRows, false);
              tile.for_each_vector([&](int64_t place, int64_t k) {
                Vector p = exponential(load(tile.scores + place) - load(log_total + k));
                if (mask) p *= load(tile.visible + place);
                store(softmax + place, p);
                store(scores + place, p * (load(scores + place) - load(mean + k)));
              });
              multiply(keys, values, rows, {softmax, kRows, 1}, outputs, values, value_rows + first_key * values, values, true);
            }
            for (int64_t m = 1; m <= in.grid_size; m++) {
              tile.go_to_harmonic(m);
              float* a = weights + ((m - 1) * in.keys + first_key) * rank;
              float* b = a + in.grid_size * in.keys * rank;
              multiply(keys, rank, rows, {tile.cosines, kRows, 1}, units, rank, a, rank, true);
              multiply(keys, rank, rows, {tile.sines, kRows, 1}, units, rank, b, rank, true);
              multiply(keys, columns, in.rank, in.weights(head, 0, m, first_key), units_transposed, kRows, with_cosines, kRows, false);
              multiply(keys, columns, in.rank, in.weights(head, 1, m, first_key), units_transposed, kRows, with_sines, kRows, false);
              tile.for_each_vector([&](int64_t place, int64_t) {
                Vector slope = load(tile.cosines + place) * load(with_sines + place) - load(tile.sines + place) * load(with_cosines + place);
                store(scores + place, m > 1 || value ? load(scores + place) + float(m) * slope : slope);
              });
            }
            multiply(rows, width, keys, {scores, 1, kRows}, tile.key_rows + first_key * width, width, query_rows, width, block);
            multiply(keys, width, rows, {scores, kRows, 1}, queries, width, key_rows + first_key * width, width, true);
            if (vertical)
              tile.for_each_vector([&](int64_t place, int64_t k) {
                int64_t q = first_key + place / kRows;
                float *down = grid_rows + q / in.grid_columns * kRows + k, *across = grid_columns + q % in.grid_columns * kRows + k;
                store(down, load(down) + load(scores + place)), store(across, load(across) + load(scores + place));
              });
            for (int64_t q = 0; with_full && q < keys; q++) {
              int64_t place = ((share_full ? group : item) * in.heads + head) * in.keys + first_key + q;
              for (int64_t k = 0; k < rows; k++) to_full[place * in.rows + tile.first_row + k] += scores[q * kRows + k];
            }
          }
          for (int64_t k = 0; k < rows; k++)
            for (int64_t c = 0; c < in.width; c++) to_query[(row + k) * in.width + c] = in.scale * query_rows[k * width + c];
          for (int64_t k = 0; k < rows; k++) {
            for (int64_t y = 0; y < in.grid_rows; y++) to_vertical[(row + k) * in.grid_rows + y] = grid_rows[y * kRows + k];
            for (int64_t x = 0; x < in.grid_columns; x++) to_horizontal[(row + k) * in.grid_columns + x] = grid_columns[x * kRows + k];
          }
        }
        int64_t first = ((part * in.items + item) * in.heads + head) * in.keys;
        for (int64_t q = 0; q < in.keys; q++) {
          for (int64_t c = 0; c < in.width; c++) to_keys[(first + q) * in.width + c] = in.scale * key_rows[q * width + c];
          for (int64_t v = 0; v < in.values; v++) to_values[(first + q) * in.values + v] = value_rows[q * values + v];
        }
      }
    }
  });
  return {
      query_gradient,
      sum_parts(key_gradients),
      sum_parts(coefficients_gradients).narrow(-1, 0, in.rank).contiguous(),
      share_full ? sum_parts(full_gradients).unsqueeze(0) : full_gradients,
      vertical_gradient,
      horizontal_gradient,
      sum_parts(value_gradients)};
}

// ---- The product with the values ----

// out_k = Σ_q v_kq (Σ_p S_kp W_qp) V_q for units S, (N, r), the projector W, (M, r), values V and a mask v. Queries that see
// the same keys share U = Wᵀ V over these keys, (r, d), and have out = S U. Without a mask these are all.
struct Projection {
  Projection(const Tensor& units, const Tensor& projector, const Tensor& value, const optional<Tensor>& mask)
      : units(units), value(value), mask(mask), projector(projector.const_data_ptr<float>()), items(units.size(0)),
        heads(units.size(1)), rows(units.size(2)), rank(units.size(3)), keys(value.size(2)), width(value.size(3)) {}

  // Calls work(queries, keys) for each set of queries that see the same keys.
  template <typename Work>
  void for_each_group(int64_t item, int64_t head, const Work& work) const {
    std::vector<int64_t> queries(rows), seen(keys);
    std::iota(queries.begin(), queries.end(), 0), std::iota(seen.begin(), seen.end(), 0);
    if (!mask) return work(queries, seen);
    const bool* start = mask.at(item, head);
    auto row = [&](int64_t k) { return start + k * mask.row; };
    auto less = [&](int64_t k, int64_t l) { return std::memcmp(row(k), row(l), mask.column ? keys : 1) < 0; };
    std::stable_sort(queries.begin(), queries.end(), less);
    for (auto first = queries.begin(); first != queries.end();) {
      auto last = std::upper_bound(first, queries.end(), *first, less);
      seen.clear();
      for (int64_t q = 0; q < keys; q++)
        if (row(*first)[q * mask.column]) seen.push_back(q);
      work(std::vector<int64_t>(first, last), seen);
      first = last;
    }
  }

  Matrices<float> units, value;
  Matrices<bool> mask;  // (B, heads, N, M)
  const float* projector;  // (heads, M, r)
  int64_t items, heads, rows, rank, keys, width;
};

// Some rows of a matrix: as they are where these are all, and whole vectors or any number of columns will do; else in a
// buffer, with zeros up to whole vectors.
Matrix some_rows(Matrix from, int64_t rows, int64_t columns, const std::vector<int64_t>& which, float* buffer, bool whole) {
  if (int64_t(which.size()) == rows && (!whole || (from.column == 1 && columns % kLanes == 0))) return from;
  int64_t row = whole_vectors(columns);
  for (size_t i = 0; i < which.size(); i++)
    for (int64_t j = 0; j < columns; j++) buffer[i * row + j] = from.at[which[i] * from.row + j * from.column];
  return {buffer, row, 1};
}

// out, (B, heads, N, d).
Tensor project(const Tensor& units, const Tensor& projector, const Tensor& value, const optional<Tensor>& mask) {
  Projection in(units, projector, value, mask);
  int64_t rank = whole_vectors(in.rank), width = whole_vectors(in.width);
  // In memory heads are joined, as torch's attention leaves them.
  Tensor output = at::empty({in.items, in.rows, in.heads, in.width}, units.options());
  float* to_output = output.data_ptr<float>();
  at::parallel_for(0, in.items * in.heads, 1, [&](int64_t begin, int64_t end) {
    Floats units_buffer(in.rows * rank), weights_buffer(in.keys * rank), values_buffer(in.keys * width);
    Floats mixed(in.rank * width), products(in.rows * width);
    for (int64_t task = begin; task < end; task++) {
      int64_t item = task / in.heads, head = task % in.heads;
      float* to = to_output + (item * in.rows * in.heads + head) * in.width;
      in.for_each_group(item, head, [&](const std::vector<int64_t>& queries, const std::vector<int64_t>& seen) {
        Matrix units = some_rows({in.units.at(item, head), in.units.row, in.units.column}, in.rows, in.rank, queries, units_buffer, false);
        Matrix weights = some_rows({in.projector + head * in.keys * in.rank, in.rank, 1}, in.keys, in.rank, seen, weights_buffer, false);
        Matrix values = some_rows({in.value.at(item, head), in.value.row, 1}, in.keys, in.width, seen, values_buffer, true);
        multiply(in.rank, width, seen.size(), {weights.at, weights.column, weights.row}, values.at, values.row, mixed, width, false);
        multiply(queries.size(), width, in.rank, units, mixed, width, products, width, false);
        for (size_t k = 0; k < queries.size(); k++)
          for (int64_t c = 0; c < in.width; c++) to[queries[k] * in.heads * in.width + c] = products[k * width + c];
      });
    }
  });
  return output.transpose(1, 2);
}

// The gradients of units, projector and value.
std::tuple<Tensor, Tensor, Tensor> project_backward(
    const Tensor& gradient, const Tensor& units, const Tensor& projector, const Tensor& value, const optional<Tensor>& mask) {
  Projection in(units, projector, value, mask);
  Matrices<float> outputs(gradient);
  int64_t rank = whole_vectors(in.rank), width = whole_vectors(in.width);
  int64_t groups = std::clamp<int64_t>(in.items, 1, (4 * at::get_num_threads() + in.heads - 1) / in.heads);
  Tensor units_gradient = at::empty({in.items, in.heads, in.rows, in.rank}, units.options());
  Tensor projector_gradients = at::zeros({groups, in.heads, in.keys, rank}, units.options());
  Tensor value_gradient = at::zeros({in.items, in.heads, in.keys, in.width}, units.options());
  float *to_units = units_gradient.data_ptr<float>(), *to_projector = projector_gradients.data_ptr<float>(),
        *to_value = value_gradient.data_ptr<float>();
  at::parallel_for(0, in.heads * groups, 1, [&](int64_t begin, int64_t end) {
    Floats units_buffer(in.rows * rank), weights_buffer(in.keys * rank), values_buffer(in.keys * width), outputs_buffer(in.rows * width);
    Floats mixed(in.width * rank), mixed_gradient(in.rank * width), mixed_gradient_transposed(in.width * rank);
    Floats unit_rows(in.rows * rank), weight_rows(in.keys * rank), value_rows(in.keys * width);
    for (int64_t task = begin; task < end; task++) {
      int64_t head = task / groups, group = task % groups;
      for (int64_t item = in.items * group / groups; item < in.items * (group + 1) / groups; item++)
        in.for_each_group(item, head, [&](const std::vector<int64_t>& queries, const std::vector<int64_t>& seen) {
          int64_t rows = queries.size(), keys = seen.size(), first_row = (item * in.heads + head) * in.rows;
          Matrix units = some_rows({in.units.at(item, head), in.units.row, in.units.column}, in.rows, in.rank, queries, units_buffer, false);
          Matrix weights = some_rows({in.projector + head * in.keys * in.rank, in.rank, 1}, in.keys, in.rank, seen, weights_buffer, true);
          Matrix values = some_rows({in.value.at(item, head), in.value.row, 1}, in.keys, in.width, seen, values_buffer, false);
          Matrix out = some_rows({outputs.at(item, head), outputs.row, 1}, in.rows, in.width, queries, outputs_buffer, true);
          // Uᵀ = Vᵀ W, (d, r), and dS = dO Uᵀ.
          multiply(in.width, rank, keys, {values.at, 1, values.row}, weights.at, weights.row, mixed, rank, false);
          multiply(rows, rank, in.width, out, mixed, rank, unit_rows, rank, false);
          // dU = Sᵀ dO, (r, d), dV = W dU and dW = V dUᵀ.
          multiply(in.rank, width, rows, {units.at, units.column, units.row}, out.at, out.row, mixed_gradient, width, false);
          multiply(keys, width, in.rank, weights, mixed_gradient, width, value_rows, width, false);
          transpose(mixed_gradient, width, in.rank, in.width, mixed_gradient_transposed, rank);
          multiply(keys, rank, in.width, values, mixed_gradient_transposed, rank, weight_rows, rank, false);
          for (int64_t k = 0; k < rows; k++)
            for (int64_t p = 0; p < in.rank; p++) to_units[(first_row + queries[k]) * in.rank + p] = unit_rows[k * rank + p];
          for (int64_t q = 0; q < keys; q++) {
            float* value = to_value + ((item * in.heads + head) * in.keys + seen[q]) * in.width;
            for (int64_t c = 0; c < in.width; c++) value[c] += value_rows[q * width + c];
            float* projector = to_projector + ((group * in.heads + head) * in.keys + seen[q]) * rank;
            for (int64_t p = 0; p < in.rank; p++) projector[p] += weight_rows[q * rank + p];
          }
        });
    }
  });
  return {units_gradient, sum_parts(projector_gradients).narrow(-1, 0, in.rank).contiguous(), value_gradient};
}

TORCH_LIBRARY_FRAGMENT(karat_det, library) {
  const std::string scores =
      "Tensor query, Tensor key, Tensor coefficients, float scale, Tensor? full, Tensor? vertical, Tensor? horizontal, "
      "Tensor? mask, Tensor? value";
  const std::string tensors_3 = "(Tensor, Tensor, Tensor)", tensors_7 = "(Tensor, Tensor, Tensor, Tensor, " + tensors_3.substr(1);
  const std::string projection = "Tensor units, Tensor projector, Tensor value, Tensor? mask";
  for (const std::string& schema : {
           "fourier_sums(" + scores + ") -> " + tensors_3,
           "fourier_sums_backward(Tensor sums_gradient, Tensor? attended_gradient, " + scores +
               ", Tensor? attended, Tensor? log_totals, bool with_full) -> " + tensors_7,
           "project(" + projection + ") -> Tensor",
           "project_backward(Tensor gradient, " + projection + ") -> " + tensors_3,
       })
    library.def(schema.c_str());
}

TORCH_LIBRARY_IMPL(karat_det, CPU, library) {
  library.impl("fourier_sums", &fourier_sums);
  library.impl("fourier_sums_backward", &fourier_sums_backward);
  library.impl("project", &project);
  library.impl("project_backward", &project_backward);
}

}  // namespace
