// Backward attention: probabilities are recomputed from the forward's log-sum-exp (FlashAttention-2, Dao 2023).
//
// One task owns a share of one kv head's key blocks: it sums dk and dv of a block over all queries and over the query
// heads that share the kv head, and writes them once; dq is summed per share and the shares are added in order. No
// two tasks write the same place, and no sum's order depends on timing.
#pragma once
#include "attention_forward.h"

namespace jaxext::JAXEXT_ISA {
namespace {

// The packed operands and partial sums of one kv head and its query heads.
// Of each row: a maximum of its scores, the logarithm of its sum relative to that (base 2), and sum(out * dout).
struct RowSums {
  float *maximum, *log_sum, *delta;
};

template <class Mode>
struct BackwardLayout {
  const AttentionArgs& args;
  int64_t share, chunks;  // query heads per kv head; tasks per kv head
  int64_t padded_keys, padded_queries, steps, value_steps;
  int64_t query_row, dout_row;   // words of a row as left operand
  int64_t key_width, out_width;  // words of a row as right operand
  int64_t key_size, head_size, size;
  float* data;

  BackwardLayout(const AttentionArgs& a, int64_t tasks)
      : args(a),
        share(a.heads / a.kv_heads),
        chunks(tasks),
        padded_keys(round_up(a.keys, Mode::kKeys)),
        padded_queries(round_up(a.queries, kQueries)),
        steps(words<Mode>(a.depth)),
        value_steps(words<Mode>(a.value_depth)),
        query_row(round_up(steps, kLanes)),
        dout_row(round_up(value_steps, kLanes)),
        key_width(round_up(a.depth, kLanes)),
        out_width(round_up(a.value_depth, kLanes)),
        data(nullptr) {
    key_size = round_up(padded_keys * (steps + value_steps) + words<Mode>(padded_keys) * key_width, 16);
    int64_t rights = Mode::kPaired ? padded_queries / 2 * (key_width + out_width) : 0;
    head_size = padded_queries * (query_row + dout_row + 3 + chunks * key_width) + rights;
    size = key_size + share * head_size;
  }

  float* key_panels(int64_t slot, int64_t key) const { return data + slot * size + key * steps; }
  float* value_panels(int64_t slot, int64_t key) const {
    return data + slot * size + padded_keys * steps + key * value_steps;
  }
  float* key_right(int64_t slot, int64_t key) const {
    return data + slot * size + padded_keys * (steps + value_steps) + words<Mode>(key) * key_width;
  }
  float* head(int64_t slot, int64_t member) const { return data + slot * size + key_size + member * head_size; }
  float* query_left(float* head, int64_t row) const { return head + row * query_row; }
  float* dout_left(float* head, int64_t row) const { return head + padded_queries * query_row + row * dout_row; }
  RowSums sums(float* head, int64_t row) const {
    float* maximum = head + padded_queries * (query_row + dout_row) + row;
    return {maximum, maximum + padded_queries, maximum + 2 * padded_queries};
  }
  float* dq(float* head, int64_t chunk, int64_t row) const {
    return head + padded_queries * (query_row + dout_row + 3) + (chunk * padded_queries + row) * key_width;
  }
  // Unpaired, the left operands of rows serve as right operands too.
  float* query_right(float* head, int64_t row) const {
    return Mode::kPaired ? dq(head, chunks, 0) + row / 2 * key_width : query_left(head, row);
  }
  float* dout_right(float* head, int64_t row) const {
    return Mode::kPaired ? dq(head, chunks, 0) + padded_queries / 2 * key_width + row / 2 * out_width
                         : dout_left(head, row);
  }
};

template <class Mode>
void pack_key_block(const BackwardLayout<Mode>& m, int64_t slot, int64_t kv, int64_t key) {
  const AttentionArgs& a = m.args;
  int64_t valid = least(a.keys - key, Mode::kKeys), keys = round_up(valid, kColumnStep<Mode>);
  auto k = row_of<Mode>(a.k, kv / a.kv_heads, kv % a.kv_heads, key);
  auto v = row_of<Mode>(a.v, kv / a.kv_heads, kv % a.kv_heads, key);
  pack_panels<Mode>(k, a.k.row, valid, keys, a.depth, m.key_panels(slot, key));
  pack_panels<Mode>(v, a.v.row, valid, keys, a.value_depth, m.value_panels(slot, key));
  pack_right<Mode>(k, a.k.row, valid, keys, a.depth, m.key_right(slot, key), m.key_width);
}

// The sums of the rows of a query block. Rows that exist nowhere (padding) and rows without any key get a maximum of
// +inf: their probabilities are then 0.
template <class Mode>
void row_statistics(const AttentionArgs& a, int64_t b, int64_t h, int64_t row, RowSums sums) {
  auto out = row_of<Mode>(a.out, b, h, row);
  auto dout = row_of<Mode>(a.dout, b, h, row);
  const float* maximum = a.lse + (b * a.heads + h) * 2 * a.queries + row;
  constexpr int64_t kAhead = 8;
  int64_t rows = least(a.queries - row, kQueries);
  for (int64_t i = 0; i < round_up(rows, kRows); i++) {
    bool empty = i >= rows || maximum[i] == -kInfinity;
    int64_t ahead = least(rows - i - kAhead, 1);
    prefetch_rows(out + (i + kAhead) * a.out.row, a.out.row, ahead, a.value_depth);
    if (a.low.data) prefetch_rows(row_of<Mode>(a.low, b, h, row + i + kAhead), a.low.row, ahead, a.value_depth);
    vf sum{};
    for (int64_t c = 0; !empty && c < a.value_depth; c += kLanes) {
      int64_t n = a.value_depth - c;
      vf g = load_part(dout + i * a.dout.row + c, n);
      sum = fma(load_part(out + i * a.out.row + c, n), g, sum);
      if (a.low.data) sum = fma(load_part(row_of<Mode>(a.low, b, h, row + i) + c, n), g, sum);
    }
    sums.delta[i] = empty ? 0.f : reduce_add(sum);
    sums.maximum[i] = empty ? kInfinity : maximum[i];
    sums.log_sum[i] = empty ? 0.f : maximum[a.queries + i];
  }
}

template <class Mode>
void pack_query_block(const BackwardLayout<Mode>& m, const Rules& rules, int64_t slot, int64_t kv,
                             int64_t member, int64_t row) {
  const AttentionArgs& a = m.args;
  int64_t b = kv / a.kv_heads, h = kv % a.kv_heads * m.share + member, rows = least(a.queries - row, kQueries);
  int64_t padded = round_up(rows, kRows);
  float* head = m.head(slot, member);
  auto q = row_of<Mode>(a.q, b, h, row);
  auto dout = row_of<Mode>(a.dout, b, h, row);
  memset(m.query_left(head, row + rows), 0, (padded - rows) * m.query_row * sizeof(float));
  memset(m.dout_left(head, row + rows), 0, (padded - rows) * m.dout_row * sizeof(float));
  pack_rows<Mode>(q, a.q.row, rows, a.depth, rules.query_scale, m.query_left(head, row), m.query_row);
  pack_rows<Mode>(dout, a.dout.row, rows, a.value_depth, 1.f, m.dout_left(head, row), m.dout_row);
  if (Mode::kPaired) {
    pack_right<Mode>(q, a.q.row, rows, padded, a.depth, m.query_right(head, row), m.key_width);
    pack_right<Mode>(dout, a.dout.row, rows, padded, a.value_depth, m.dout_right(head, row), m.out_width);
  }
  row_statistics<Mode>(a, b, h, row, m.sums(head, row));
  for (int64_t chunk = 0; chunk < m.chunks; chunk++)
    memset(m.dq(head, chunk, row), 0, padded * m.key_width * sizeof(float));
}

// Probabilities and score gradients of one block of queries against one block of keys, kept for the products that
// contract over queries. Unpaired: [kQueries][kKeys]; paired: [kQueries / 2][kKeys] words of two rows.
template <class Mode>
struct GradientTile {
  float *probabilities, *dscores;
  float *scores, *dweights, *left;  // scratch of kRows rows; unpaired, the first two lie in the tile itself
  float* slope;

  static constexpr int64_t kTile = words<Mode>(kQueries) * Mode::kKeys;
  static constexpr int64_t kStrip = kRows * Mode::kKeys;
  static constexpr int64_t kScratch = 2 * kTile + 4 * kStrip + 16;

  explicit GradientTile(float* memory)
      : probabilities(memory),
        dscores(memory + kTile),
        scores(memory + 2 * kTile),
        dweights(scores + kStrip),
        left(dweights + kStrip),
        slope(left + kStrip) {}

  float* rows(float* tile, int64_t i) const { return tile + words<Mode>(i) * Mode::kKeys; }
};

// A zero-filled margin: columns that a strip of rows leaves out but a product over other rows' span reads.
void clear_columns(float* tile, int64_t rows, int64_t width, int64_t first, int64_t last) {
  for (int64_t r = 0; r < rows; r++) {
    memset(tile + r * width, 0, first * sizeof(float));
    memset(tile + r * width + last, 0, (width - last) * sizeof(float));
  }
}

// p = 2^(score - maximum - log_sum) and ds = p (dp - delta), in place of scores and dp.
JAXEXT_NOINLINE void score_gradients(float* scores, float* dp, int64_t width, int64_t first, int64_t last,
                                            float exponent, RowSums sums, const float* slope, const Dropout& drop) {
  vf scale = splat(exponent);
  for (int64_t r = 0; r < kRows; r++) {
    float *x = scores + r * width, *y = dp + r * width;
    vf maximum = splat(sums.maximum[r]), log_sum = splat(sums.log_sum[r]), mean = splat(sums.delta[r]);
    for (int64_t c = first; c < last; c += kLanes) {
      vf p = exp2_fast<Float32>(fma(load(x + c), scale, -maximum) - log_sum), d = load(y + c);
      vf kept = p;
      if (drop.keep) {
        vf factor = dropout_factor(drop, r, c);
        kept = p * factor;
        d = d * factor;
      }
      d = p * (d - mean);
      if (slope) d = d * load(slope + r * width + c);
      store(x + c, kept);
      store(y + c, d);
    }
  }
}

#if defined(__AVX512BF16__)
JAXEXT_INLINE vf pair_rows(vf even, vf odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vf)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

// As score_gradients, for plain tiles: rounded to bf16, in pairs of rows and (ds) in pairs of columns.
JAXEXT_NOINLINE void pair_gradients(const float* scores, const float* dp, int64_t first, int64_t last,
                                           float exponent, RowSums sums, float* p_rows,
                                           float* ds_rows, float* ds_left) {
  constexpr int64_t width = Paired::kKeys;
  vf scale = splat(exponent);
  for (int64_t r = 0; r < kRows; r += 2)
    for (int64_t c = first; c < last; c += 2 * kLanes) {
      vf p[2][2], ds[2][2];
      JAXEXT_UNROLL
      for (int i = 0; i < 2; i++) {
        vf maximum = splat(sums.maximum[r + i]), log_sum = splat(sums.log_sum[r + i]), mean = splat(sums.delta[r + i]);
        JAXEXT_UNROLL
        for (int v = 0; v < 2; v++) {
          int64_t at = (r + i) * width + c + v * kLanes;
          p[i][v] = exp2_fast<Paired>(fma(load(scores + at), scale, -maximum) - log_sum);
          ds[i][v] = p[i][v] * (load(dp + at) - mean);
        }
      }
      JAXEXT_UNROLL
      for (int v = 0; v < 2; v++) {
        store(p_rows + r / 2 * width + c + v * kLanes, pair_rows(p[0][v], p[1][v]));
        store(ds_rows + r / 2 * width + c + v * kLanes, pair_rows(ds[0][v], ds[1][v]));
      }
      JAXEXT_UNROLL
      for (int i = 0; i < 2; i++) store(ds_left + ((r + i) * width + c) / 2, pair_columns(ds[i][0], ds[i][1]));
    }
}

// Already computed p and ds, rounded and paired.
void pair_computed(const float* p, const float* ds, int64_t first, int64_t last, float* p_rows, float* ds_rows,
                          float* ds_left) {
  constexpr int64_t width = Paired::kKeys;
  for (int64_t r = 0; r < kRows; r += 2)
    for (int64_t c = first; c < last; c += kLanes) {
      const float *x = p + r * width + c, *y = ds + r * width + c;
      store(p_rows + r / 2 * width + c, pair_rows(load(x), load(x + width)));
      store(ds_rows + r / 2 * width + c, pair_rows(load(y), load(y + width)));
    }
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t c = first; c < last; c += 2 * kLanes)
      store(ds_left + (r * width + c) / 2, pair_columns(load(ds + r * width + c), load(ds + r * width + c + kLanes)));
}
#endif

// One task: a block of queries of one head against one block of keys.
template <class Mode>
struct GradientBlock {
  const Rules& rules;
  const BackwardLayout<Mode>& m;
  int64_t slot, kv, chunk, key;
  GradientTile<Mode> tile;
  float *dk, *dv;
  // Set per query head.
  HeadArrays arrays;
  float* head;

  // kRows rows from row + i on: fills their strip of the tile and adds to dq.
  void strip(int64_t row, int64_t i, bool hidden) {
    const AttentionArgs& a = m.args;
    float* p = tile.rows(tile.probabilities, i);
    float* ds = tile.rows(tile.dscores, i);
    Span band = band_span(a, row + i, kRows, key, Mode::kKeys);
    if (band.first >= band.last) return clear_strip(p, ds, 0, 0);
    if (hidden) {
      Visibility seen = strip_visibility(a, arrays, row + i, least(a.queries - row - i, kRows), key, band);
      if (seen == Visibility::none) return clear_strip(p, ds, 0, 0);
      hidden = seen == Visibility::some;
    }
    Span inner{row + i + kRows - 1 + a.band_low - key, row + i + a.band_high + 1 - key};
    int64_t first = round_down(band.first, kColumnStep<Mode>), last = round_up(band.last, kColumnStep<Mode>);
    hidden = hidden || (rules.hides && (first < band.first || last > band.last));
    float* scores = Mode::kPaired ? tile.scores : p;
    float* dweights = Mode::kPaired ? tile.dweights : ds;
    panel_product<Mode>(scores, Mode::kKeys, {m.query_left(head, row + i), m.query_row, 1}, m.key_panels(slot, key),
                        m.steps, first, last);
    panel_product<Mode>(dweights, Mode::kKeys, {m.dout_left(head, row + i), m.dout_row, 1},
                        m.value_panels(slot, key), m.value_steps, first, last);
    bool cut = first < most(band.first, inner.first) || last > least(band.last, inner.last);
    float* slope = a.soft_cap != 0.f ? tile.slope : nullptr;
    if (cut || hidden || rules.changes)
      apply_rules(rules, arrays, row + i, key, first, last, scores, Mode::kKeys, slope);
    if (first > 0 || last < Mode::kKeys) clear_strip(p, ds, first, last);
    gradients(scores, dweights, p, ds, row, i, first, last, slope);
    if (!a.dq.data) return;
    Left left = Mode::kPaired ? Left{tile.left, Mode::kKeys / 2, 1} : Left{ds, Mode::kKeys, 1};
    left.data += words<Mode>(first);
    wide_product<Mode>(m.dq(head, chunk, row + i), m.key_width, left,
                             {m.key_right(slot, key) + words<Mode>(first) * m.key_width, m.key_width},
                             words<Mode>(band.last - first), m.key_width);
  }

  void clear_strip(float* p, float* ds, int64_t first, int64_t last) {
    clear_columns(p, words<Mode>(kRows), Mode::kKeys, first, last);
    clear_columns(ds, words<Mode>(kRows), Mode::kKeys, first, last);
  }

  void gradients(float* scores, float* dweights, float* p, float* ds, int64_t row, int64_t i, int64_t first,
                 int64_t last, const float* slope) {
    const AttentionArgs& a = m.args;
    float exponent = rules.changes ? 1.f : rules.exponent;
    RowSums sums = m.sums(head, row + i);
#if defined(__AVX512BF16__)
    if constexpr (Mode::kPaired)
      if (!slope && !arrays.keep)
        return pair_gradients(scores, dweights, first, last, exponent, sums, p, ds, tile.left);
#endif
    Dropout drop{arrays.keep ? arrays.keep + (row + i) * a.keep.query + key * a.keep.key : nullptr,
                 a.keep.query, a.keep.key, a.keys - key, a.queries - row - i, a.keep_scale};
    score_gradients(scores, dweights, Mode::kKeys, first, last, exponent, sums, slope, drop);
#if defined(__AVX512BF16__)
    if constexpr (Mode::kPaired) pair_computed(scores, dweights, first, last, p, ds, tile.left);
#endif
  }

  // dv += p' dout and dk += ds' q over the rows of the block that attend these keys.
  void contract_queries(int64_t row, int64_t rows) {
    const AttentionArgs& a = m.args;
    int64_t keys = least(a.keys - key, Mode::kKeys);
    for (int64_t j = 0; j < keys;) {
      bool few = Mode::kKeys - j == kFewRows || Mode::kKeys - j == 2 * kFewRows;
      int64_t height = few ? kFewRows : kRows;
      int64_t first = most(key + j - a.band_high - row, 0) / 2 * 2;
      int64_t last = least(key + j + height - 1 - a.band_low + 1 - row, rows);
      if (first < last) {
        int64_t at = words<Mode>(first) * Mode::kKeys + j, steps = words<Mode>(last - first);
        Left p{tile.probabilities + at, 1, Mode::kKeys}, ds{tile.dscores + at, 1, Mode::kKeys};
        Right dout{m.dout_right(head, row + first), m.out_width}, q{m.query_right(head, row + first), m.key_width};
        if (few) {
          wide_product<Mode, kFewRows>(dv + j * m.out_width, m.out_width, p, dout, steps, m.out_width);
          wide_product<Mode, kFewRows>(dk + j * m.key_width, m.key_width, ds, q, steps, m.key_width);
        } else {
          wide_product<Mode>(dv + j * m.out_width, m.out_width, p, dout, steps, m.out_width);
          wide_product<Mode>(dk + j * m.key_width, m.key_width, ds, q, steps, m.key_width);
        }
      }
      j += height;
    }
  }

  void attend(int64_t row) {
    const AttentionArgs& a = m.args;
    int64_t rows = least(a.queries - row, kQueries);
    Span band = band_span(a, row, rows, key, Mode::kKeys);
    if (band.first >= band.last) return;
    bool hidden = false;
    if (rules.hides) {
      Visibility seen = visibility(a, arrays, row, rows, key + band.first, band.last - band.first);
      if (seen == Visibility::none) return;
      hidden = seen == Visibility::some;
    }
    for (int64_t i = 0; i < rows; i += kRows) {
      prefetch_strip(a, arrays, row + i + kRows, key, Mode::kKeys);
      strip(row, i, hidden);
    }
    if (a.dk.data || a.dv.data) contract_queries(row, rows);
  }
};

template <class Element>
void write_rows(Element* out, int64_t stride, const float* in, int64_t width, int64_t rows, int64_t depth,
                       float factor) {
  constexpr int64_t kAhead = 8;
  for (int64_t i = 0; i < rows; i++) {
    prefetch_rows(out + (i + kAhead) * stride, stride, least(rows - i - kAhead, 1), depth);
    for (int64_t c = 0; c < depth; c += kLanes)
      store_part(out + i * stride + c, load(in + i * width + c) * splat(factor), depth - c);
  }
}

// Rows whose keys are all hidden and whose fill is not zero: each gives every key weight * dout.
template <class Mode>
void add_filled_rows(const BackwardLayout<Mode>& m, int64_t b, int64_t h, const HeadArrays& arrays, int64_t key,
                     int64_t keys, float* dv) {
  const AttentionArgs& a = m.args;
  if (a.fill == AttentionFill::zeros) return;
  float weight = a.fill == AttentionFill::nan ? __builtin_nanf("") : 1.f / static_cast<float>(a.keys);
  const float* maximum = a.lse + (b * a.heads + h) * 2 * a.queries;
  for (int64_t i = 0; i < a.queries; i++) {
    if (maximum[i] != -kInfinity) continue;
    auto dout = row_of<Mode>(a.dout, b, h, i);
    for (int64_t j = key; j < key + keys; j++) {
      float w = weight;
      if (arrays.keep) w *= arrays.keep[i * a.keep.query + j * a.keep.key] ? a.keep_scale : 0.f;
      for (int64_t c = 0; c < a.value_depth; c += kLanes) {
        float* p = dv + (j - key) * m.out_width + c;
        store(p, fma(splat(w), load_part(dout + c, a.value_depth - c), load(p)));
      }
    }
  }
}

// The key blocks chunk, chunk + chunks, … of one kv head.
template <class Mode>
void backward_chunk(const Rules& rules, const BackwardLayout<Mode>& m, int64_t slot, int64_t kv,
                           int64_t chunk) {
  const AttentionArgs& a = m.args;
  int64_t b = kv / a.kv_heads, g = kv % a.kv_heads, rows = Mode::kKeys + kRows;
  int64_t sums = rows * (m.key_width + m.out_width);
  auto memory = static_cast<float*>(thread_arena((sums + GradientTile<Mode>::kScratch) * sizeof(float)));
  float factor = Mode::kPaired ? a.scale : kLn2;  // of packed q: its scale is folded in
  for (int64_t key = chunk * Mode::kKeys; key < a.keys; key += m.chunks * Mode::kKeys) {
    int64_t keys = least(a.keys - key, Mode::kKeys);
    GradientBlock<Mode> block{rules,  m, slot, kv, chunk, key, GradientTile<Mode>(memory + sums),
                              memory, memory + rows * m.key_width, {}, nullptr};
    memset(block.dk, 0, (keys + kRows) * m.key_width * sizeof(float));
    memset(block.dv, 0, (keys + kRows) * m.out_width * sizeof(float));
    for (int64_t member = 0; member < m.share; member++) {
      block.head = m.head(slot, member);
      block.arrays = head_arrays(a, b, g * m.share + member);
      int64_t first = most(key - a.band_high, 0) / kQueries * kQueries;
      int64_t last = least(key + keys - a.band_low, a.queries);
      for (int64_t row = first; row < last; row += kQueries) block.attend(row);
      add_filled_rows(m, b, g * m.share + member, block.arrays, key, keys, block.dv);
    }
    if (a.dk.data) write_rows(row_of<Mode>(a.dk, b, g, key), a.dk.row, block.dk, m.key_width, keys, a.depth, factor);
    if (a.dv.data) write_rows(row_of<Mode>(a.dv, b, g, key), a.dv.row, block.dv, m.out_width, keys, a.value_depth, 1.f);
  }
}

// dq of one block of queries: the chunks' sums, added in order.
template <class Mode>
void finish_queries(const BackwardLayout<Mode>& m, int64_t slot, int64_t kv, int64_t member, int64_t row) {
  const AttentionArgs& a = m.args;
  if (!a.dq.data) return;
  int64_t rows = least(a.queries - row, kQueries);
  float* head = m.head(slot, member);
  float* sum = m.dq(head, 0, row);
  for (int64_t chunk = 1; chunk < m.chunks; chunk++) {
    const float* part = m.dq(head, chunk, row);
    for (int64_t x = 0; x < rows * m.key_width; x += kLanes) store(sum + x, load(sum + x) + load(part + x));
  }
  write_rows(row_of<Mode>(a.dq, kv / a.kv_heads, kv % a.kv_heads * m.share + member, row), a.dq.row, sum, m.key_width,
             rows, a.depth, a.scale);
}

template <class Mode>
void backward(const AttentionArgs& args, const Parallel& par) {
  Rules rules = make_rules<Mode>(args);
  int64_t kv_heads = args.batch * args.kv_heads;
  int64_t key_blocks = (args.keys + Mode::kKeys - 1) / Mode::kKeys;
  int64_t query_blocks = (args.queries + kQueries - 1) / kQueries;
  int64_t chunks = most(1, least(key_blocks, (4 * par.threads + kv_heads - 1) / kv_heads));
  BackwardLayout<Mode> m(args, chunks);
  int64_t wave = wave_heads(kv_heads, m.size, par);
  m.data = static_cast<float*>(acquire_workspace(wave * m.size * sizeof(float)));
  for (int64_t base = 0; base < kv_heads; base += wave) {
    int64_t count = least(wave, kv_heads - base), blocks = m.share * query_blocks;
    parallel_for(par, count * key_blocks, [&](int64_t t) {
      pack_key_block(m, t / key_blocks, base + t / key_blocks, t % key_blocks * Mode::kKeys);
    });
    parallel_for(par, count * blocks, [&](int64_t t) {
      int64_t slot = t / blocks;
      pack_query_block(m, rules, slot, base + slot, t / query_blocks % m.share, t % query_blocks * kQueries);
    });
    parallel_for(par, count * chunks,
                 [&](int64_t t) { backward_chunk(rules, m, t / chunks, base + t / chunks, t % chunks); });
    parallel_for(par, count * blocks, [&](int64_t t) {
      int64_t slot = t / blocks;
      finish_queries(m, slot, base + slot, t / query_blocks % m.share, t % query_blocks * kQueries);
    });
  }
  release_workspace(m.data);
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
