// Forward attention: online softmax over blocks of keys, one block of queries at a time (FlashAttention-2, Dao 2023).
#pragma once
#include "attention_pack.h"
#include "attention_scores.h"
#include "attention_workspace.h"

namespace jaxext::JAXEXT_ISA {
namespace {

// A row's reference maximum is raised only when a score exceeds it by this many powers of two: rescaling is rare, and
// the exponentials stay far from overflow.
constexpr float kHeadroom = 8.f;

// kv heads whose packed operands (`floats` each) are held at a time: enough for every thread, and otherwise so few that
// they are still in the cache when used.
int64_t wave_heads(int64_t kv_heads, int64_t floats, const Parallel& par) {
  constexpr int64_t kCached = int64_t{2} << 20;
  return least(kv_heads, most(4 * par.threads, kCached * par.threads / (floats * 4 + 1)));
}

// One vector per row of partial sums, base-2 maxima, unnormalised output.
struct RowState {
  float *maximum, *sum, *out;
};

JAXEXT_INLINE bool any_lane(vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)x);
#else
  return _mm_movemask_ps((__m128)x);
#endif
}

// Raises the maxima of kRows rows to those of their new scores and rescales what was summed so far.
JAXEXT_NOINLINE void raise_maxima(const float* scores, int64_t width, int64_t first, int64_t last,
                                         float exponent, RowState state, int64_t out_width) {
  for (int64_t r = 0; r < kRows; r++) {
    vf top = splat(kBelowScores);
    for (int64_t c = first; c < last; c += kLanes) top = max(load(scores + r * width + c) * splat(exponent), top);
    float old = state.maximum[r], raised = reduce_max(top);
    if (!(raised > old)) continue;
    state.maximum[r] = raised;
    vf factor = exp2_fast<Float32>(splat(old - raised));
    store(state.sum + r * kLanes, load(state.sum + r * kLanes) * factor);
    for (int64_t c = 0; c < out_width; c += kLanes) {
      float* p = state.out + r * out_width + c;
      store(p, load(p) * factor);
    }
  }
}

#if defined(__AVX512BF16__)
// Two vectors of weights as one of bf16, columns in order.
JAXEXT_INLINE vf pair_columns(vf low, vf high) { return (vf)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
#endif

struct Dropout {
  const uint8_t* keep;  // first row and key of the tile; null: none
  int64_t query, key, keys, rows;
  float scale;
};

JAXEXT_INLINE vf dropout_factor(const Dropout& drop, int64_t r, int64_t c) {
  const uint8_t* p = drop.keep + least(r, drop.rows - 1) * drop.query + c * drop.key;
  return select(load_flags(p, drop.key, drop.keys - c), splat(drop.scale), splat(0.f));
}

// Scores become softmax weights (times dropout) in place, as left operand of the product with the values.
// first and last are multiples of kColumnStep.
template <class Mode, bool kDrop>
JAXEXT_INLINE void exponentiate(float* scores, float* weights, int64_t first, int64_t last, float exponent,
                                RowState state, const Dropout& drop) {
  constexpr int kParts = kColumnStep<Mode> / kLanes;
  vf scale = splat(exponent);
  JAXEXT_UNROLL
  for (int64_t r = 0; r < kRows; r++) {
    float* row = scores + r * Mode::kKeys;
    vf reference = splat(state.maximum[r]), sum = load(state.sum + r * kLanes);
    for (int64_t c = first; c < last; c += kColumnStep<Mode>) {
      vf x[kParts];
      JAXEXT_UNROLL
      for (int v = 0; v < kParts; v++) {
        vf raw = load(row + c + v * kLanes);
        x[v] = exp2_fast<Mode>(Mode::kPaired ? fma(raw, scale, -reference) : raw - reference);
        sum = sum + x[v];
        if constexpr (kDrop) x[v] = x[v] * dropout_factor(drop, r, c + v * kLanes);
      }
#if defined(__AVX512BF16__)
      if constexpr (Mode::kPaired) {
        store(weights + r * words<Mode>(Mode::kKeys) + c / 2, pair_columns(x[0], x[1]));
        continue;
      }
#endif
      store(weights + r * Mode::kKeys + c, x[0]);
    }
    store(state.sum + r * kLanes, sum);
  }
}

template <class Mode>
bool exceeds_maxima(const float* scores, int64_t first, int64_t last, float exponent, const float* maximum) {
  vi exceeds{};
  JAXEXT_UNROLL
  for (int64_t r = 0; r < kRows; r++) {
    const float* row = scores + r * Mode::kKeys;
    vf top = load(row + first);
    for (int64_t c = first + kLanes; c < last; c += kLanes) top = max(top, load(row + c));
    exceeds |= top * splat(exponent) > splat(maximum[r] + kHeadroom);
  }
  return any_lane(exceeds);
}

// Scores [kRows][kKeys] of one tile into weights and row sums.
template <class Mode>
JAXEXT_NOINLINE void softmax_tile(float* scores, float* weights, int64_t first, int64_t last, float exponent,
                                         RowState state, int64_t out_width, const Dropout& drop) {
  if (exceeds_maxima<Mode>(scores, first, last, exponent, state.maximum))
    raise_maxima(scores, Mode::kKeys, first, last, exponent, state, out_width);
  if (drop.keep)
    exponentiate<Mode, true>(scores, weights, first, last, exponent, state, drop);
  else if (first == 0 && last == Mode::kKeys)
    exponentiate<Mode, false>(scores, weights, 0, Mode::kKeys, exponent, state, drop);
  else
    exponentiate<Mode, false>(scores, weights, first, last, exponent, state, drop);
}

// Keys and values of the kv heads [first, first + count) packed for all query blocks.
template <class Mode>
struct PackedKeys {
  const AttentionArgs& args;
  int64_t padded_keys, steps, out_width, keys_size, size;
  float* data;

  explicit PackedKeys(const AttentionArgs& a)
      : args(a),
        padded_keys(round_up(a.keys, Mode::kKeys)),
        steps(words<Mode>(a.depth)),
        out_width(round_up(a.value_depth, kLanes)),
        keys_size(padded_keys * steps),
        size(round_up(keys_size + words<Mode>(padded_keys) * out_width, 16)),
        data(nullptr) {}

  float* panels(int64_t slot, int64_t key) const { return data + slot * size + key * steps; }
  float* values(int64_t slot, int64_t key) const {
    return data + slot * size + keys_size + words<Mode>(key) * out_width;
  }
  void pack(int64_t slot, int64_t kv_head, int64_t key) const {
    int64_t b = kv_head / args.kv_heads, h = kv_head % args.kv_heads;
    int64_t valid = least(args.keys - key, Mode::kKeys), keys = round_up(valid, kColumnStep<Mode>);
    auto k = row_of<Mode>(args.k, b, h, key), v = row_of<Mode>(args.v, b, h, key);
    pack_panels<Mode>(k, args.k.row, valid, keys, args.depth, panels(slot, key));
    pack_right<Mode>(v, args.v.row, valid, keys, args.value_depth, values(slot, key), out_width);
  }
};

// A block of queries of one (batch, head), with its scratch.
template <class Mode>
struct QueryBlock {
  const Rules& rules;
  HeadArrays arrays;
  int64_t batch, head, row, rows;  // rows: of the block that exist
  int64_t query_width, out_width;
  float *queries, *scores, *weights;
  RowState state;

  static int64_t scratch(const AttentionArgs& a) {
    int64_t steps = round_up(words<Mode>(a.depth), kLanes), out = round_up(a.value_depth, kLanes);
    return kQueries * (steps + out + 1 + kLanes) + kRows * 2 * Mode::kKeys;
  }

  QueryBlock(const Rules& r, int64_t b, int64_t h, int64_t first, float* memory)
      : rules(r), arrays(head_arrays(*r.args, b, h)), batch(b), head(h), row(first) {
    const AttentionArgs& a = *r.args;
    rows = least(a.queries - first, kQueries);
    query_width = round_up(words<Mode>(a.depth), kLanes);
    out_width = round_up(a.value_depth, kLanes);
    queries = memory;
    state.out = queries + kQueries * query_width;
    state.sum = state.out + kQueries * out_width;
    scores = state.sum + kQueries * kLanes;
    weights = Mode::kPaired ? scores + kRows * Mode::kKeys : scores;
    state.maximum = scores + kRows * 2 * Mode::kKeys;
  }

  RowState rows_from(int64_t i) const {
    return {state.maximum + i, state.sum + i * kLanes, state.out + i * out_width};
  }

  void start() {
    const AttentionArgs& a = *rules.args;
    auto q = row_of<Mode>(a.q, batch, head, row);
    pack_rows<Mode>(q, a.q.row, rows, a.depth, rules.query_scale, queries, query_width);
    int64_t padded = round_up(rows, kRows);
    memset(queries + rows * query_width, 0, (padded - rows) * query_width * sizeof(float));
    memset(state.out, 0, padded * out_width * sizeof(float));
    memset(state.sum, 0, padded * kLanes * sizeof(float));
    for (int64_t i = 0; i < padded; i++) state.maximum[i] = kBelowScores;
  }

  // kRows queries from i on against the key block that starts at `start`.
  void attend(int64_t i, int64_t start, bool hidden, const float* panels, const float* values) {
    const AttentionArgs& a = *rules.args;
    Span band = band_span(a, row + i, kRows, start, Mode::kKeys);
    if (band.first >= band.last) return;
    Span inner{row + i + kRows - 1 + a.band_low - start, row + i + a.band_high + 1 - start};
    int64_t first = round_down(band.first, kColumnStep<Mode>), last = round_up(band.last, kColumnStep<Mode>);
    panel_product<Mode>(scores, Mode::kKeys, {queries + i * query_width, query_width, 1}, panels,
                        words<Mode>(a.depth), first, last);
    bool cut = first < most(band.first, inner.first) || last > least(band.last, inner.last);
    if (cut || hidden || rules.changes) apply_rules(rules, arrays, row + i, start, first, last, scores, Mode::kKeys);
    Dropout drop{arrays.keep ? arrays.keep + (row + i) * a.keep.query + start * a.keep.key : nullptr,
                 a.keep.query, a.keep.key, a.keys - start, rows - i, a.keep_scale};
    softmax_tile<Mode>(scores, weights, first, last, rules.changes ? 1.f : rules.exponent, rows_from(i), out_width,
                       drop);
    accumulate_product<Mode>(state.out + i * out_width, out_width,
                             {weights + words<Mode>(first), words<Mode>(Mode::kKeys), 1},
                             {values + words<Mode>(first) * out_width, out_width},
                             words<Mode>(band.last - first), out_width);
  }

  void attend_block(int64_t start, const float* panels, const float* values) {
    const AttentionArgs& a = *rules.args;
    Span band = band_span(a, row, rows, start, Mode::kKeys);
    if (band.first >= band.last) return;
    prefetch_block(a, arrays, row, start + Mode::kKeys, Mode::kKeys);
    bool hidden = false;
    if (rules.hides) {
      Visibility seen = visibility(a, arrays, row, rows, start + band.first, band.last - band.first);
      if (seen == Visibility::none) return;
      hidden = seen == Visibility::some;
    }
    for (int64_t i = 0; i < rows; i += kRows) attend(i, start, hidden, panels, values);
  }

  // A row that no key contributed to: hidden altogether (the fill's case), or scores of -inf (NaN, as softmax gives).
  float empty_row(int64_t i) {
    const AttentionArgs& a = *rules.args;
    bool hidden = true;
    for (int64_t j = 0; j < a.keys && hidden; j++) hidden = !attends(a, arrays, row + i, j);
    float weight = !hidden || a.fill == AttentionFill::nan ? __builtin_nanf("")
                   : a.fill == AttentionFill::uniform      ? 1.f / static_cast<float>(a.keys)
                                                           : 0.f;
    float* sum = state.out + i * out_width;
    memset(sum, 0, out_width * sizeof(float));
    auto v = row_of<Mode>(a.v, batch, head / (a.heads / a.kv_heads), 0);
    for (int64_t j = 0; j < a.keys && weight != 0.f; j++) {
      const uint8_t* keep = arrays.keep ? arrays.keep + (row + i) * a.keep.query + j * a.keep.key : nullptr;
      vf w = splat(keep ? (*keep ? weight * a.keep_scale : weight * 0.f) : weight);
      for (int64_t c = 0; c < a.value_depth; c += kLanes)
        store(sum + c, fma(w, load_part(v + j * a.v.row + c, a.value_depth - c), load(sum + c)));
    }
    write_row(i, sum, 1.f);
    return hidden ? -kInfinity : weight;
  }

  void write_row(int64_t i, const float* sum, float factor) {
    typedef typename Mode::Element Element;
    const AttentionArgs& a = *rules.args;
    Element* out = row_of<Mode>(a.out, batch, head, row + i);
    Element* low = a.low.data ? row_of<Mode>(a.low, batch, head, row + i) : nullptr;
    for (int64_t c = 0; c < a.value_depth; c += kLanes) {
      vf x = load(sum + c) * splat(factor);
      store_part(out + c, x, a.value_depth - c);
      if constexpr (sizeof(Element) == 2)
        if (low) store_part(low + c, x - widen(narrow(x)), a.value_depth - c);
    }
  }

  void finish() {
    const AttentionArgs& a = *rules.args;
    float* maximum = a.lse + (batch * a.heads + head) * 2 * a.queries + row;
    float* log_sum = maximum + a.queries;
    for (int64_t i = 0; i < rows; i++) {
      float sum = reduce_add(load(state.sum + i * kLanes));
      if (sum == 0.f) {
        maximum[i] = empty_row(i);
        log_sum[i] = 0.f;
        continue;
      }
      write_row(i, state.out + i * out_width, 1.f / sum);
      maximum[i] = state.maximum[i];
      log_sum[i] = __builtin_log2f(sum);
    }
  }
};

template <class Mode>
void forward_block(const Rules& rules, const PackedKeys<Mode>& packed, int64_t slot, int64_t batch,
                          int64_t head, int64_t row) {
  const AttentionArgs& a = *rules.args;
  QueryBlock<Mode> block(rules, batch, head, row,
                         static_cast<float*>(thread_arena(QueryBlock<Mode>::scratch(a) * sizeof(float))));
  block.start();
  Span band = band_span(a, row, block.rows, 0, a.keys);
  for (int64_t start = band.first / Mode::kKeys * Mode::kKeys; start < band.last; start += Mode::kKeys)
    block.attend_block(start, packed.panels(slot, start), packed.values(slot, start));
  block.finish();
}

// A wave of kv heads at a time: pack their keys and values, then run their query blocks, the last (under a causal band
// the longest) first.
template <class Mode>
void forward(const AttentionArgs& args, const Parallel& par) {
  Rules rules = make_rules<Mode>(args);
  PackedKeys<Mode> packed(args);
  int64_t kv_heads = args.batch * args.kv_heads, share = args.heads / args.kv_heads;
  int64_t wave = wave_heads(kv_heads, packed.size, par);
  int64_t key_blocks = packed.padded_keys / Mode::kKeys, query_blocks = (args.queries + kQueries - 1) / kQueries;
  packed.data = static_cast<float*>(acquire_workspace(wave * packed.size * sizeof(float)));
  for (int64_t base = 0; base < kv_heads; base += wave) {
    int64_t count = least(wave, kv_heads - base);
    parallel_for(par, count * key_blocks, [&](int64_t t) {
      packed.pack(t / key_blocks, base + t / key_blocks, t % key_blocks * Mode::kKeys);
    });
    parallel_for(par, count * share * query_blocks, [&](int64_t t) {
      int64_t slot = t / (share * query_blocks), member = t / query_blocks % share, kv = base + slot;
      forward_block<Mode>(rules, packed, slot, kv / args.kv_heads, kv % args.kv_heads * share + member,
                          (query_blocks - 1 - t % query_blocks) * kQueries);
    });
  }
  release_workspace(packed.data);
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
