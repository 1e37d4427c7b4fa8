// Attention by sums of Fourier series over scores that are never in memory, for the CPU, in float32.
//
// With scores A = scale · Q Kᵀ + bias, (N, M) for each item of a batch and each head, the operator needs for p = 1..r
//
//     S_kp = Σ_q Σ_m a_pqm cos(m A_kq) + b_pqm sin(m A_kq),   output = S U with U = f Wᵀ V, (r, v), f a fixed factor,
//
// and the residual adds softmax(A) V. From dO, the gradient of the output, the backward pass forms dS = dO Uᵀ and
//
//     dA_kq = Σ_m m (cos(m A_kq) Σ_p b_pqm dS_kp − sin(m A_kq) Σ_p a_pqm dS_kp),
//     dQ = scale · dA K,   dK = scale · dAᵀ Q,   da_pqm = Σ_k cos(m A_kq) dS_kp,   db_pqm = Σ_k sin(m A_kq) dS_kp,
//     dU = Sᵀ dO,   dV = f W dU,   dW = f V dUᵀ.
//
// A thread works on a tile of scores: at most kRows queries and kKeys keys of one item and head, which stay in its cache.
// A tile is transposed, keys × queries, so that a vector register holds queries. Scores, sines and cosines are formed
// again in the backward pass. Where a query does not see a key, cosine and sine are 0, and so is the score's gradient; the
// output is (f S Wᵀ ∘ mask) V then, tile by tile.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "matrices.h"

namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kRows = 64, kKeys = 56, kTile = kKeys * kRows;  // scores, sines and cosines take 3 · 14 KiB

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

// ---- Tiles ----

struct Inputs {
  Inputs(
      const Tensor& query, const Tensor& key, const Tensor& coefficients, double scale, const optional<Tensor>& full,
      const optional<Tensor>& vertical, const optional<Tensor>& horizontal, const optional<Tensor>& mask,
      const optional<Tensor>& value, const optional<Tensor>& projector, double factor, bool residual)
        : transposed_full(transposed(full)), transposed_mask(transposed(mask)), query(query), key(key),
          full(transposed_full), vertical(vertical), horizontal(horizontal), value(value), mask(transposed_mask),
          coefficients(coefficients.const_data_ptr<float>()),
          projector(projector ? projector->const_data_ptr<float>() : nullptr), scale(scale), factor(factor),
          residual(residual), items(query.size(0)), heads(query.size(1)), rows(query.size(2)), keys(key.size(2)),
          width(query.size(3)), grid_size(coefficients.size(2)), rank(coefficients.size(4)),
          values(value ? value->size(3) : 0), grid_rows(vertical ? vertical->size(3) : 0),
          grid_columns(horizontal ? horizontal->size(3) : 0) {
    check("query", query, {items, heads, rows, width});
    check("key", key, {items, heads, keys, width});
    check("coefficients", coefficients, {heads, 2, grid_size, keys, rank});
    check("vertical", vertical, {items, heads, rows, grid_rows});
    check("horizontal", horizontal, {items, heads, rows, grid_columns});
    check("value", value, {items, heads, keys, values});
    check("projector", projector, {heads, keys, rank});
    check("full", transposed_full, {items, heads, keys, rows}, true);
    check("mask", transposed_mask, {items, heads, keys, rows}, true);
    TORCH_CHECK_VALUE(
        grid_rows * grid_columns == (vertical || horizontal ? keys : 0), "A grid must have a place a key.");
    TORCH_CHECK_VALUE(value || !(projector || residual), "A projector or residual needs a value.");
    TORCH_CHECK_VALUE(coefficients.is_contiguous(), "coefficients must be contiguous.");
    TORCH_CHECK_VALUE(!projector || projector->is_contiguous(), "projector must be contiguous.");
  }

  // Memory is read by these sizes.
  static void check(const char* name, const optional<Tensor>& x, at::IntArrayRef sizes, bool broadcasts = false) {
    if (!x) return;
    bool fits = x->dim() == static_cast<int64_t>(sizes.size());
    for (int64_t d = 0; fits && d < x->dim(); d++) fits = x->size(d) == sizes[d] || (broadcasts && x->size(d) == 1);
    TORCH_CHECK_VALUE(fits, name, " has the shape ", x->sizes(), ". It must be ", sizes, ".");
    TORCH_CHECK_VALUE(x->size(-1) < 2 || x->stride(-1) == 1, name, " must have its last dimension in one piece.");
  }

  // a_pqm, of kind 0, or b_pqm, of kind 1, from a key on: (M, r).
  Matrix weights(int64_t head, int64_t kind, int64_t m, int64_t first_key) const {
    return {coefficients + (((head * 2 + kind) * grid_size + m - 1) * keys + first_key) * rank, rank, 1};
  }
  // W from a key on: (M, r).
  Matrix projector_of(int64_t head, int64_t first_key = 0) const {
    return {projector + (head * keys + first_key) * rank, rank, 1};
  }
  int64_t tiles() const { return (rows + kRows - 1) / kRows; }
  int64_t key_blocks() const { return (keys + kKeys - 1) / kKeys; }

  static optional<Tensor> transposed(const optional<Tensor>& x) {
    return x ? optional<Tensor>(x->transpose(-1, -2).contiguous()) : x;
  }

  optional<Tensor> transposed_full, transposed_mask;  // queries follow each other, as in a tile
  Matrices<float> query, key, full, vertical, horizontal, value;
  Matrices<bool> mask;  // (B, heads, M, N), as full is
  const float *coefficients, *projector;  // (heads, 2, G, M, r), (heads, M, r)
  float scale, factor;
  bool residual;
  int64_t items, heads, rows, keys, width, grid_size, rank, values, grid_rows, grid_columns;
};

// The scores of one tile after the other, and their cosines and sines.
class Tile {
 public:
  explicit Tile(const Inputs& in)
        : scores(kTile), cosines(kTile), sines(kTile), visible(in.mask ? kTile : 0),
          key_rows(in.keys * whole_vectors(in.width)), value_rows(in.keys * whole_vectors(in.values)), in(in),
          first_cosines(in.grid_size > 1 ? kTile : 0), first_sines(in.grid_size > 1 ? kTile : 0),
          queries(in.width * kRows), vertical(in.grid_rows * kRows), horizontal(in.grid_columns * kRows) {}

  // Whether it went to another item or head.
  bool go_to(int64_t next_item, int64_t next_head) {
    if (item == next_item && head == next_head) return false;
    item = next_item, head = next_head;
    copy(in.key.at(item, head), in.key.row, in.keys, in.width, key_rows, whole_vectors(in.width));
    if (in.value) copy(in.value.at(item, head), in.value.row, in.keys, in.values, value_rows, whole_vectors(in.values));
    masked = false;
    for (int64_t q = 0; in.mask && !masked && q < (in.mask.row ? in.keys : 1); q++)
      masked = std::memchr(in.mask.at(item, head) + q * in.mask.row, 0, in.mask.column ? in.rows : 1);
    return true;
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

  // Goes to a block of keys, and looks which of them the queries see.
  void go_to_keys(int64_t block) {
    first_key = in.keys * block / in.key_blocks();
    keys = in.keys * (block + 1) / in.key_blocks() - first_key;
    for (int64_t q = 0; masked && q < keys; q++) {
      const bool* from = in.mask.at(item, head) + (first_key + q) * in.mask.row + first_row * in.mask.column;
      for (int64_t k = 0; k < rows; k++) visible[q * kRows + k] = from[k * in.mask.column];
    }
  }

  void form_scores() {
    if (in.vertical) add_grid();
    if (in.full) add_full();
    int64_t width = whole_vectors(in.width);
    multiply(
        keys, columns, in.width, {key_rows + first_key * width, width, 1}, queries, kRows, scores, kRows,
        in.vertical || in.full);
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
        if (masked) cosine *= load(visible + place), sine *= load(visible + place);
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

  // f · (matrix ∘ mask), for a matrix keys × rows.
  void scale_visible(float* matrix) const {
    for_each_vector([&](int64_t place, int64_t) {
      store(matrix + place, in.factor * load(visible + place) * load(matrix + place));
    });
  }

  template <typename Work>
  void for_each_vector(const Work& work) const {
    for (int64_t q = 0; q < keys; q++)
      for (int64_t k = 0; k < columns; k += kLanes) work(q * kRows + k, k);
  }

  int64_t item = -1, head = -1;
  bool masked;  // some query of the item and head does not see a key
  int64_t first_row, rows, columns;  // queries of the tile, and the elements of whole vectors of them
  int64_t first_key, keys;
  Floats scores, cosines, sines, visible;  // (keys, kRows)
  Floats key_rows, value_rows;  // K and V: (M, d or v in whole vectors)

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

  void reduce_large() {
    for (int64_t q = 0; q < keys; q++)
      for (int64_t place = q * kRows; place < q * kRows + rows; place++) {
        if (std::abs(scores[place]) <= kReducible) continue;
        float factor = masked ? visible[place] : 1.0f;
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
        : in(in), exponentials(in.residual ? kTile : 0), attended(in.residual ? in.values * kRows : 0), highest(kRows),
          totals(kRows) {}

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
    int64_t values = whole_vectors(in.values);
    Matrix transposed = {tile.value_rows + tile.first_key * values, 1, values};
    multiply(in.values, tile.columns, tile.keys, transposed, exponentials, kRows, attended, kRows, tile.first_key);
  }

  // Writes softmax(A) V, (rows, v in whole vectors), and log Σ_q exp A_kq.
  void finish(const Tile& tile, float* to, float* log_totals) {
    for (int64_t k = 0; k < tile.columns; k += kLanes) {
      Vector factor = 1 / load(totals + k);
      for (int64_t place = k; place < in.values * kRows; place += kRows)
        store(attended + place, factor * load(attended + place));
    }
    transpose(attended, kRows, in.values, tile.rows, to, whole_vectors(in.values));
    for (int64_t k = 0; k < tile.rows; k++) log_totals[k] = highest[k] + std::log(totals[k]);
  }

 private:
  static constexpr float kLowest = -1e30f;

  Vector seen_score(const Tile& tile, int64_t place) const {
    Vector score = load(tile.scores + place);
    return tile.masked ? select(load(tile.visible + place) != 0, score, Vector{} + 2 * kLowest) : score;
  }

  const Inputs& in;
  Floats exponentials, attended, highest, totals;
};

// ---- Forward ----

// S, (B, heads, r, N); with a projector or the residual the output, (B, heads, N, v); with the residual log Σ_q exp A_kq,
// (B, heads, N, 1).
std::tuple<Tensor, Tensor, Tensor> fourier_attention(
    const Tensor& query, const Tensor& key, const Tensor& coefficients, double scale, const optional<Tensor>& full,
    const optional<Tensor>& vertical, const optional<Tensor>& horizontal, const optional<Tensor>& mask,
    const optional<Tensor>& value, const optional<Tensor>& projector, double factor, bool residual) {
  Inputs in(query, key, coefficients, scale, full, vertical, horizontal, mask, value, projector, factor, residual);
  int64_t values = whole_vectors(in.values);
  // In memory queries follow each other in S, as in a tile, and heads in the output, as torch's attention leaves them.
  Tensor units = at::empty({in.items, in.heads, in.rank, in.rows}, query.options());
  Tensor output = at::empty({in.items, value ? in.rows : 0, in.heads, in.values}, query.options());
  Tensor log_totals = at::empty({in.items, in.heads, residual ? in.rows : 0, 1}, query.options());
  float *to_units = units.data_ptr<float>(), *to_output = output.data_ptr<float>(),
        *to_log_totals = log_totals.data_ptr<float>();

  at::parallel_for(0, in.items * in.heads * in.tiles(), 1, [&](int64_t begin, int64_t end) {
    Tile tile(in);
    Softmax softmax(in);
    Floats sums(in.rank * kRows), mixed(in.rank * values), weights(in.mask ? kTile : 0), outputs(kRows * values);
    for (int64_t task = begin; task < end; task++) {
      int64_t place = task / in.tiles();
      bool moved = tile.go_to(place / in.heads, place % in.heads);
      if (moved && projector && !tile.masked) {  // U = f Wᵀ V, (r, v)
        multiply(
            in.rank, values, in.keys, in.projector_of(tile.head).transposed(), tile.value_rows, values, mixed, values,
            false);
        mixed.scale(in.factor);
      }
      tile.go_to_rows(task % in.tiles());
      for (int64_t block = 0; block < in.key_blocks(); block++) {
        tile.go_to_keys(block);
        tile.form_scores();
        if (residual) softmax.add(tile);
        for (int64_t m = 1; m <= in.grid_size; m++) {
          tile.go_to_harmonic(m);
          for (int kind : {0, 1}) {
            Matrix weights = in.weights(tile.head, kind, m, tile.first_key).transposed();
            multiply(
                in.rank, tile.columns, tile.keys, weights, kind ? tile.sines : tile.cosines, kRows, sums, kRows,
                block || m > 1 || kind);
          }
        }
      }
      copy_out(sums, kRows, in.rank, tile.rows, to_units + place * in.rank * in.rows + tile.first_row, in.rows);
      if (!value) continue;

      if (residual) softmax.finish(tile, outputs, to_log_totals + place * in.rows + tile.first_row);
      if (projector && !tile.masked)
        multiply(tile.rows, values, in.rank, {sums, 1, kRows}, mixed, values, outputs, values, residual);
      for (int64_t block = 0; projector && tile.masked && block < in.key_blocks(); block++) {
        tile.go_to_keys(block);
        multiply(
            tile.keys, tile.columns, in.rank, in.projector_of(tile.head, tile.first_key), sums, kRows, weights, kRows,
            false);
        tile.scale_visible(weights);
        multiply(
            tile.rows, values, tile.keys, {weights, 1, kRows}, tile.value_rows + tile.first_key * values, values,
            outputs, values, residual || block);
      }
      float* to = to_output + ((tile.item * in.rows + tile.first_row) * in.heads + tile.head) * in.values;
      copy_out(outputs, values, tile.rows, in.values, to, in.heads * in.values);
    }
  });
  return {units, output.transpose(1, 2), log_totals};
}

// ---- Backward ----

// The sum of so many parts, one after the other along the first dimension.
Tensor sum_parts(const Tensor& x, int64_t parts) {
  return parts == 1 ? x : x.unflatten(0, {parts, x.size(0) / parts}).sum(0);
}

// A task of the backward pass: some items, heads and tiles.
struct Task {
  int64_t index, first_item, end_item, first_head, end_head, first_tile, end_tile;
};

// Shares the work out to tasks, as evenly among threads as it goes. Tasks for the same heads add up gradients of their own.
class Plan {
 public:
  explicit Plan(const Inputs& in) : in(in) {
    int64_t threads = at::get_num_threads();
    heads = std::gcd(in.heads, threads);
    int64_t wanted = threads / heads;  // for the tasks of the same heads
    items = in.items >= 8 * wanted ? wanted : std::max<int64_t>(1, std::gcd(in.items, wanted));
    tiles = std::clamp<int64_t>(wanted / items, 1, std::max<int64_t>(1, in.tiles()));
    // Where a task has one item, one head after the other is as near, and its gradients take less memory.
    if (heads * items * tiles < threads || items == in.items) heads = in.heads;
  }
  int64_t sums() const { return items * tiles; }
  int64_t size() const { return heads * sums(); }

  Task operator[](int64_t task) const {
    int64_t head = task / sums(), item = task / tiles % items, tile = task % tiles;
    return {item * tiles + tile,
            in.items * item / items,
            in.items * (item + 1) / items,
            in.heads * head / heads,
            in.heads * (head + 1) / heads,
            in.tiles() * tile / tiles,
            in.tiles() * (tile + 1) / tiles};
  }

  int64_t items, heads, tiles;  // how many parts each is cut into

 private:
  const Inputs& in;
};

// What the backward pass is given beside the inputs.
struct Given {
  Matrices<float> d_units,
      d_output;  // gradients of S, (B, heads, N, r), and of the output, (B, heads, N, v); absent ones are 0
  Matrices<float> units, output, log_totals;  // results of the forward pass: S, (B, heads, r, N), and so on
};

// The gradients of a task's coefficients and projectors; and of what belongs to one item and head, and to one tile, in turn.
// dX is the gradient of X.
class Gradients {
 public:
  Gradients(const Inputs& in, const Given& given, int64_t heads)
        : tile(in), rank(whole_vectors(in.rank)), width(whole_vectors(in.width)), values(whole_vectors(in.values)),
          d_coefficients(heads * 2 * in.grid_size * in.keys * rank),
          d_projectors(in.projector ? heads * in.keys * rank : 0), d_keys(in.keys * width), d_values(in.keys * values),
          d_queries(kRows * width), d_vertical(in.grid_rows * kRows), d_horizontal(in.grid_columns * kRows),
          d_scores(kTile), in(in), given(given), projector_rows(in.projector ? in.keys * rank : 0),
          queries(kRows * width), units(in.rank * kRows), unit_rows(kRows * rank), d_units(in.rank * kRows),
          d_unit_rows(kRows * rank), d_outputs(kRows * values), d_outputs_transposed(in.values * kRows),
          log_totals(kRows), mean(kRows), with_cosines(kTile), with_sines(kTile),
          weights(in.residual || in.mask ? kTile : 0), mixed(in.values * rank), d_mixed(in.rank * values),
          d_mixed_transposed(in.values * rank) {}

  void start(int64_t item, int64_t head, int64_t head_of_task) {
    tile.go_to(item, head);
    d_weights = d_coefficients + head_of_task * 2 * in.grid_size * in.keys * rank;
    d_projector = d_projectors + (in.projector ? head_of_task * in.keys * rank : 0);
    if (in.projector) copy(in.projector_of(head).at, in.rank, in.keys, in.rank, projector_rows, rank);
    d_keys.clear(), d_values.clear(), d_mixed.clear();
    if (in.projector && !tile.masked) {  // Uᵀ = f Vᵀ W, (v, r)
      multiply(in.values, rank, in.keys, {tile.value_rows, 1, values}, projector_rows, rank, mixed, rank, false);
      mixed.scale(in.factor);
    }
  }

  // Forms dS, and of the residual the mean of dP for P = softmax(A), which is Σ_q P_kq dP_kq.
  void start_rows(int64_t t) {
    tile.go_to_rows(t);
    copy(tile.rows_of(in.query), in.query.row, tile.rows, in.width, queries, width);
    d_vertical.clear(), d_horizontal.clear(), d_unit_rows.clear(), mean.clear();
    if (given.d_output) {
      copy(tile.rows_of(given.d_output), given.d_output.row, tile.rows, in.values, d_outputs, values);
      if (in.residual || tile.masked) tile.transpose_rows(given.d_output, in.values, d_outputs_transposed);
      if (in.projector) project_back();
      if (in.residual) form_mean();
    }
    if (given.d_units)
      for (int64_t k = 0; k < tile.rows; k++)
        for (int64_t p = 0; p < in.rank; p++)
          d_unit_rows[k * rank + p] += tile.rows_of(given.d_units)[k * given.d_units.row + p * given.d_units.column];
    transpose(d_unit_rows, rank, tile.rows, in.rank, d_units, kRows);
  }

  // Forms dA for a block of keys and adds up what follows from it.
  void add(int64_t block) {
    tile.go_to_keys(block);
    tile.form_scores();
    int64_t first_key = tile.first_key, keys = tile.keys, rows = tile.rows, columns = tile.columns;
    bool with_softmax = in.residual && given.d_output;
    if (with_softmax) add_softmax();
    for (int64_t m = 1; m <= in.grid_size; m++) {
      tile.go_to_harmonic(m);
      float* a = d_weights + ((m - 1) * in.keys + first_key) * rank;
      float* b = a + in.grid_size * in.keys * rank;
      multiply(keys, rank, rows, {tile.cosines, kRows, 1}, d_unit_rows, rank, a, rank, true);
      multiply(keys, rank, rows, {tile.sines, kRows, 1}, d_unit_rows, rank, b, rank, true);
      multiply(
          keys, columns, in.rank, in.weights(tile.head, 0, m, first_key), d_units, kRows, with_cosines, kRows, false);
      multiply(
          keys, columns, in.rank, in.weights(tile.head, 1, m, first_key), d_units, kRows, with_sines, kRows, false);
      tile.for_each_vector([&](int64_t place, int64_t) {
        Vector slope = load(tile.cosines + place) * load(with_sines + place) -
                       load(tile.sines + place) * load(with_cosines + place);
        store(d_scores + place, m > 1 || with_softmax ? load(d_scores + place) + float(m) * slope : slope);
      });
    }
    multiply(
        rows, width, keys, {d_scores, 1, kRows}, tile.key_rows + first_key * width, width, d_queries, width, block);
    multiply(keys, width, rows, {d_scores, kRows, 1}, queries, width, d_keys + first_key * width, width, true);
    if (in.vertical)
      tile.for_each_vector([&](int64_t place, int64_t k) {
        int64_t q = first_key + place / kRows;
        float *down = d_vertical + q / in.grid_columns * kRows + k,
              *across = d_horizontal + q % in.grid_columns * kRows + k;
        store(down, load(down) + load(d_scores + place)), store(across, load(across) + load(d_scores + place));
      });
  }

  void finish() {
    if (!in.projector || tile.masked) return;
    d_mixed.scale(in.factor);  // dV = f W dU, and dW = f V dUᵀ
    multiply(in.keys, values, in.rank, {projector_rows, rank, 1}, d_mixed, values, d_values, values, true);
    transpose(d_mixed, values, in.rank, in.values, d_mixed_transposed, rank);
    multiply(in.keys, rank, in.values, {tile.value_rows, values, 1}, d_mixed_transposed, rank, d_projector, rank, true);
  }

  Tile tile;
  int64_t rank, width, values;  // sizes in whole vectors
  Floats d_coefficients, d_projectors;  // (heads, 2, G, M, r), (heads, M, r)
  Floats d_keys, d_values;  // of an item: (M, d), (M, v)
  Floats d_queries, d_vertical, d_horizontal, d_scores;  // of a tile: (rows, d), (H or W, rows), (keys, rows)

 private:
  // Rows of dS from those of dO, and what the output does to V and W.
  void project_back() {
    int64_t rows = tile.rows;
    copy(given.units.at(tile.item, tile.head) + tile.first_row, given.units.row, in.rank, rows, units, kRows);
    if (!tile.masked) {  // dS = dO Uᵀ, and dU = Sᵀ dO
      multiply(rows, rank, in.values, {d_outputs, values, 1}, mixed, rank, d_unit_rows, rank, false);
      multiply(in.rank, values, rows, {units, kRows, 1}, d_outputs, values, d_mixed, values, true);
      return;
    }
    transpose(units, kRows, in.rank, rows, unit_rows, rank);
    for (int64_t block = 0; block < in.key_blocks(); block++) {
      tile.go_to_keys(block);
      Matrix projector = {projector_rows + tile.first_key * rank, rank, 1};
      // The weights of the values, f W Sᵀ ∘ mask: dV is their product with dO.
      multiply(tile.keys, tile.columns, in.rank, projector, units, kRows, weights, kRows, false);
      tile.scale_visible(weights);
      multiply(
          tile.keys, values, rows, {weights, kRows, 1}, d_outputs, values, d_values + tile.first_key * values, values,
          true);
      // Their gradients, f V dOᵀ ∘ mask: dS and dW are products of these.
      Matrix value = {tile.value_rows + tile.first_key * values, values, 1};
      multiply(tile.keys, tile.columns, in.values, value, d_outputs_transposed, kRows, weights, kRows, false);
      tile.scale_visible(weights);
      multiply(rows, rank, tile.keys, {weights, 1, kRows}, projector.at, rank, d_unit_rows, rank, true);
      multiply(
          tile.keys, rank, rows, {weights, kRows, 1}, unit_rows, rank, d_projector + tile.first_key * rank, rank, true);
    }
  }

  // Σ_q P dP is dO · P V, and P V is the output without W's part, whose product with dO is S · dS.
  void form_mean() {
    std::copy_n(tile.rows_of(given.log_totals), tile.rows, log_totals + 0);
    const float* output = tile.rows_of(given.output);
    for (int64_t k = 0; k < tile.rows; k++) {
      for (int64_t v = 0; v < in.values; v++) mean[k] += d_outputs[k * values + v] * output[k * given.output.row + v];
      for (int64_t p = 0; in.projector && p < in.rank; p++) mean[k] -= units[p * kRows + k] * d_unit_rows[k * rank + p];
    }
  }

  // With P = softmax(A) and dP = dO Vᵀ: dA = P ∘ (dP − mean), and dV = Pᵀ dO.
  void add_softmax() {
    int64_t first_value = tile.first_key * values;
    multiply(
        tile.keys, tile.columns, in.values, {tile.value_rows + first_value, values, 1}, d_outputs_transposed, kRows,
        d_scores, kRows, false);
    tile.for_each_vector([&](int64_t place, int64_t k) {
      Vector p = exponential(load(tile.scores + place) - load(log_totals + k));
      if (tile.masked) p *= load(tile.visible + place);
      store(weights + place, p);
      store(d_scores + place, p * (load(d_scores + place) - load(mean + k)));
    });
    multiply(
        tile.keys, values, tile.rows, {weights, kRows, 1}, d_outputs, values, d_values + first_value, values, true);
  }

  const Inputs& in;
  const Given& given;
  float *d_weights, *d_projector;  // of the head
  Floats projector_rows;  // W, (M, r)
  Floats queries;  // (rows, d)
  Floats units, unit_rows, d_units, d_unit_rows;  // S and dS: (r, rows) and (rows, r)
  Floats d_outputs, d_outputs_transposed;  // dO: (rows, v), (v, rows)
  Floats log_totals, mean;  // (rows)
  Floats with_cosines, with_sines, weights;  // (keys, rows)
  Floats mixed, d_mixed, d_mixed_transposed;  // Uᵀ, (v, r); dU, (r, v); dUᵀ
};

// The gradients of query, key, coefficients, full, of all heads, vertical, horizontal, value and projector. Those of absent
// inputs are empty, as is that of full without with_full.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fourier_attention_backward(
    const optional<Tensor>& units_gradient, const optional<Tensor>& output_gradient, const Tensor& query,
    const Tensor& key, const Tensor& coefficients, double scale, const optional<Tensor>& full,
    const optional<Tensor>& vertical, const optional<Tensor>& horizontal, const optional<Tensor>& mask,
    const optional<Tensor>& value, const optional<Tensor>& projector, double factor, bool residual, const Tensor& units,
    const optional<Tensor>& output, const optional<Tensor>& log_totals, bool with_full) {
  Inputs in(query, key, coefficients, scale, full, vertical, horizontal, mask, value, projector, factor, residual);
  Given given{
      Matrices<float>(units_gradient), Matrices<float>(output_gradient), Matrices<float>(units),
      Matrices<float>(output), Matrices<float>(log_totals)};

  Plan plan(in);
  auto options = query.options();
  Tensor query_gradient = at::empty({in.items, in.heads, in.rows, in.width}, options);
  Tensor key_gradients = at::empty({plan.tiles * in.items, in.heads, in.keys, in.width}, options);
  Tensor coefficients_gradients = at::empty({plan.sums() * in.heads, 2, in.grid_size, in.keys, in.rank}, options);
  bool share_full = with_full && full->size(0) == 1;
  Tensor full_gradients =
      at::zeros({share_full ? plan.items : in.items, in.heads, in.keys, with_full ? in.rows : 0}, options);
  Tensor vertical_gradient = at::empty({in.items, in.heads, in.rows, in.grid_rows}, options);
  Tensor horizontal_gradient = at::empty({in.items, in.heads, in.rows, in.grid_columns}, options);
  Tensor value_gradients = at::empty({plan.tiles * in.items, in.heads, in.keys, in.values}, options);
  Tensor projector_gradients = at::empty({plan.sums() * in.heads, projector ? in.keys : 0, in.rank}, options);
  float *to_query = query_gradient.data_ptr<float>(), *to_keys = key_gradients.data_ptr<float>(),
        *to_coefficients = coefficients_gradients.data_ptr<float>(), *to_full = full_gradients.data_ptr<float>(),
        *to_vertical = vertical_gradient.data_ptr<float>(), *to_horizontal = horizontal_gradient.data_ptr<float>(),
        *to_values = value_gradients.data_ptr<float>(), *to_projector = projector_gradients.data_ptr<float>();

  at::parallel_for(0, plan.size(), 1, [&](int64_t begin, int64_t end) {
    Gradients sums(in, given, in.heads / plan.heads);
    const Tile& tile = sums.tile;
    for (int64_t index = begin; index < end; index++) {
      Task task = plan[index];
      sums.d_coefficients.clear(), sums.d_projectors.clear();
      for (int64_t item = task.first_item; item < task.end_item; item++)
        for (int64_t head = task.first_head; head < task.end_head; head++) {
          sums.start(item, head, head - task.first_head);
          for (int64_t t = task.first_tile; t < task.end_tile; t++) {
            sums.start_rows(t);
            for (int64_t block = 0; block < in.key_blocks(); block++) {
              sums.add(block);
              for (int64_t q = 0; with_full && q < tile.keys; q++) {
                int64_t place =
                    ((share_full ? task.index / plan.tiles : item) * in.heads + head) * in.keys + tile.first_key + q;
                for (int64_t k = 0; k < tile.rows; k++)
                  to_full[place * in.rows + tile.first_row + k] += sums.d_scores[q * kRows + k];
              }
            }
            int64_t row = (item * in.heads + head) * in.rows + tile.first_row;
            copy_out(sums.d_queries, sums.width, tile.rows, in.width, to_query + row * in.width, in.width, in.scale);
            for (int64_t k = 0; k < tile.rows; k++) {
              for (int64_t y = 0; y < in.grid_rows; y++)
                to_vertical[(row + k) * in.grid_rows + y] = sums.d_vertical[y * kRows + k];
              for (int64_t x = 0; x < in.grid_columns; x++)
                to_horizontal[(row + k) * in.grid_columns + x] = sums.d_horizontal[x * kRows + k];
            }
          }
          sums.finish();
          int64_t key = ((task.index % plan.tiles * in.items + item) * in.heads + head) * in.keys;
          copy_out(sums.d_keys, sums.width, in.keys, in.width, to_keys + key * in.width, in.width, in.scale);
          copy_out(sums.d_values, sums.values, in.keys, in.values, to_values + key * in.values, in.values);
        }
      int64_t first = task.index * in.heads + task.first_head, heads = task.end_head - task.first_head;
      int64_t size = 2 * in.grid_size * in.keys;
      copy_out(
          sums.d_coefficients, sums.rank, heads * size, in.rank, to_coefficients + first * size * in.rank, in.rank);
      if (projector)
        copy_out(
            sums.d_projectors, sums.rank, heads * in.keys, in.rank, to_projector + first * in.keys * in.rank, in.rank);
    }
  });
  return {
      query_gradient,
      sum_parts(key_gradients, plan.tiles),
      sum_parts(coefficients_gradients, plan.sums()),
      (share_full ? full_gradients.sum(0, true) : full_gradients).transpose(2, 3),
      vertical_gradient,
      horizontal_gradient,
      sum_parts(value_gradients, plan.tiles),
      sum_parts(projector_gradients, plan.sums())};
}

// ---- Autograd ----

class Attention : public torch::autograd::Function<Attention> {
 public:
  static variable_list forward(
      AutogradContext* context, const Tensor& query, const Tensor& key, const Tensor& coefficients, double scale,
      const optional<Tensor>& full, const optional<Tensor>& vertical, const optional<Tensor>& horizontal,
      const optional<Tensor>& mask, const optional<Tensor>& value, const optional<Tensor>& projector, double factor,
      bool residual) {
    at::AutoDispatchBelowAutograd guard;
    static auto op = find<decltype(fourier_attention)>("karat_det::fourier_attention");
    auto [units, output, log_totals] =
        op.call(query, key, coefficients, scale, full, vertical, horizontal, mask, value, projector, factor, residual);
    auto tensor = [](const optional<Tensor>& x) { return x.value_or(Tensor()); };
    context->set_materialize_grads(false);
    context->saved_data["settings"] = std::make_tuple(scale, factor, residual);
    context->save_for_backward(
        {query, key, coefficients, tensor(full), tensor(vertical), tensor(horizontal), tensor(mask), tensor(value),
         tensor(projector), units, residual ? output : Tensor(), residual ? log_totals : Tensor()});
    return {units, output, log_totals};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    static auto op = find<decltype(fourier_attention_backward)>("karat_det::fourier_attention_backward");
    auto [scale, factor, residual] = context->saved_data["settings"].to<std::tuple<double, double, bool>>();
    variable_list saved = context->get_saved_variables();
    auto given = [](const Tensor& x) { return x.defined() ? optional<Tensor>(x) : std::nullopt; };
    Tensor d_units = gradients[0], d_output = gradients[1];
    if (d_units.defined()) d_units = d_units.transpose(-1, -2);
    if (d_output.defined() && d_output.stride(-1) != 1) d_output = d_output.contiguous();
    bool with_full = saved[3].defined() && context->needs_input_grad(3);
    auto [query, key, coefficients, full, vertical, horizontal, value, projector] = op.call(
        given(d_units), given(d_output), saved[0], saved[1], saved[2], scale, given(saved[3]), given(saved[4]),
        given(saved[5]), given(saved[6]), given(saved[7]), given(saved[8]), factor, residual, saved[9],
        given(saved[10]), given(saved[11]), with_full);
    if (with_full) full = full.sum_to_size(saved[3].sizes());
    auto of = [&](int input, const Tensor& gradient) { return saved[input].defined() ? gradient : Tensor(); };
    return {
        query,
        key,
        coefficients,
        {},
        with_full ? full : Tensor(),
        of(4, vertical),
        of(5, horizontal),
        {},
        of(7, value),
        of(8, projector),
        {},
        {}};
  }

 private:
  template <typename Signature>
  static c10::TypedOperatorHandle<Signature> find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  }
};

std::tuple<Tensor, Tensor, Tensor> attend(
    const Tensor& query, const Tensor& key, const Tensor& coefficients, double scale, const optional<Tensor>& full,
    const optional<Tensor>& vertical, const optional<Tensor>& horizontal, const optional<Tensor>& mask,
    const optional<Tensor>& value, const optional<Tensor>& projector, double factor, bool residual) {
  auto results = Attention::apply(
      query, key, coefficients, scale, full, vertical, horizontal, mask, value, projector, factor, residual);
  return {results[0], results[1], results[2]};
}

TORCH_LIBRARY_FRAGMENT(karat_det, library) {
  const std::string inputs =
      "Tensor query, Tensor key, Tensor coefficients, float scale, Tensor? full, Tensor? vertical, Tensor? horizontal, "
      "Tensor? mask, Tensor? value, Tensor? projector, float factor, bool residual";
  library.def(("fourier_attention(" + inputs + ") -> (Tensor, Tensor, Tensor)").c_str());
  library.def(("fourier_attention_backward(Tensor? units_gradient, Tensor? output_gradient, " + inputs +
               ", Tensor units, Tensor? output, Tensor? log_totals, bool with_full)"
               " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
                  .c_str());
}

TORCH_LIBRARY_IMPL(karat_det, CPU, library) {
  library.impl("fourier_attention", &fourier_attention);
  library.impl("fourier_attention_backward", &fourier_attention_backward);
}

TORCH_LIBRARY_IMPL(karat_det, Autograd, library) {
  library.impl("fourier_attention", &attend);
  library.impl("fourier_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
