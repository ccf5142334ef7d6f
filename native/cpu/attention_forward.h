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

// Whether one task takes a kv head from packing to results: enough heads to occupy the threads evenly, and operands that
// stay in a core's own cache from one head to the next.
bool whole_heads(int64_t kv_heads, int64_t floats, const Parallel& par) {
  constexpr int64_t kCached = int64_t{512} << 10;
  return floats * 4 <= kCached && (par.threads <= 1 || kv_heads >= 8 * par.threads);
}

// Runs task(kv head) for all heads, few at a time where there are many.
template <class F>
void for_heads(const Parallel& par, int64_t kv_heads, const F& task) {
  int64_t n = least(kv_heads, 16 * par.threads);
  parallel_for(par, n, [&](int64_t t) {
    for (int64_t kv = t * kv_heads / n; kv < (t + 1) * kv_heads / n; kv++) task(kv);
  });
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

// Raises the maxima of kRows rows to those of their new scores and rescales what was summed so far (fresh: nothing).
JAXEXT_NOINLINE void raise_maxima(const float* scores, int64_t width, int64_t first, int64_t last,
                                         float exponent, RowState state, int64_t out_width, bool fresh) {
  for (int64_t r = 0; r < kRows; r++) {
    vf top = splat(kBelowScores);
    for (int64_t c = first; c < last; c += kLanes) top = max(load(scores + r * width + c) * splat(exponent), top);
    float old = state.maximum[r], raised = reduce_max(top);
    if (!(raised > old)) continue;
    state.maximum[r] = raised;
    if (fresh) continue;
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
    float* row = scores + r * kForwardKeys<Mode>;
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
        store(weights + r * words<Mode>(kForwardKeys<Mode>) + c / 2, pair_columns(x[0], x[1]));
        continue;
      }
#endif
      store(weights + r * kForwardKeys<Mode> + c, x[0]);
    }
    store(state.sum + r * kLanes, sum);
  }
}

template <class Mode>
bool exceeds_maxima(const float* scores, int64_t first, int64_t last, float exponent, const float* maximum) {
  vi exceeds{};
  JAXEXT_UNROLL
  for (int64_t r = 0; r < kRows; r++) {
    const float* row = scores + r * kForwardKeys<Mode>;
    vf top = load(row + first);
    for (int64_t c = first + kLanes; c < last; c += kLanes) top = max(top, load(row + c));
    exceeds |= top * splat(exponent) > splat(maximum[r] + kHeadroom);
  }
  return any_lane(exceeds);
}

// Scores [kRows][kKeys] of one tile into weights and row sums.
template <class Mode>
JAXEXT_NOINLINE void softmax_tile(float* scores, float* weights, int64_t first, int64_t last, float exponent,
                                         RowState state, int64_t out_width, bool fresh, const Dropout& drop) {
  if (fresh || exceeds_maxima<Mode>(scores, first, last, exponent, state.maximum))
    raise_maxima(scores, kForwardKeys<Mode>, first, last, exponent, state, out_width, fresh);
  if (drop.keep)
    exponentiate<Mode, true>(scores, weights, first, last, exponent, state, drop);
  else if (first == 0 && last == kForwardKeys<Mode>)
    exponentiate<Mode, false>(scores, weights, 0, kForwardKeys<Mode>, exponent, state, drop);
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
        padded_keys(round_up(a.keys, kForwardKeys<Mode>)),
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
    int64_t valid = least(args.keys - key, kForwardKeys<Mode>), keys = round_up(valid, kColumnStep<Mode>);
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
  bool begun[kQueries / kRows] = {};  // strips of kRows rows that some key block was attended by

  static int64_t scratch(const AttentionArgs& a) {
    int64_t steps = round_up(words<Mode>(a.depth), kLanes), out = round_up(a.value_depth, kLanes);
    return kQueries * (steps + out + 1 + kLanes) + kRows * 2 * kForwardKeys<Mode>;
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
    weights = Mode::kPaired ? scores + kRows * kForwardKeys<Mode> : scores;
    state.maximum = scores + kRows * 2 * kForwardKeys<Mode>;
  }

  RowState rows_from(int64_t i) const {
    return {state.maximum + i, state.sum + i * kLanes, state.out + i * out_width};
  }

  // Packs kRows queries and asks for what the next strip reads and this one will write.
  void begin(int64_t i) {
    const AttentionArgs& a = *rules.args;
    int64_t existing = least(rows - i, kRows);
    auto q = row_of<Mode>(a.q, batch, head, row + i);
    prefetch_rows(q + kRows * a.q.row, a.q.row, least(rows - i - kRows, kRows), a.depth);
    pack_rows<Mode>(q, a.q.row, existing, a.depth, rules.query_scale, queries + i * query_width, query_width);
    for (int64_t r = existing; r < kRows; r++)
      for (int64_t c = 0; c < query_width; c += kLanes) store(queries + (i + r) * query_width + c, vf{});
    prefetch_rows(row_of<Mode>(a.out, batch, head, row + i), a.out.row, existing, a.value_depth);
    if (a.low.data) prefetch_rows(row_of<Mode>(a.low, batch, head, row + i), a.low.row, existing, a.value_depth);
    for (int64_t r = 0; r < kRows; r++) {
      store(state.sum + (i + r) * kLanes, vf{});
      state.maximum[i + r] = kBelowScores;
    }
  }

  // kRows queries from i on against the key block that starts at `start`.
  void attend(int64_t i, int64_t start, bool hidden, const float* panels, const float* values) {
    const AttentionArgs& a = *rules.args;
    Span band = band_span(a, row + i, kRows, start, kForwardKeys<Mode>);
    if (band.first >= band.last) return;
    if (hidden) {
      Visibility seen = strip_visibility(a, arrays, row + i, least(rows - i, kRows), start, band);
      if (seen == Visibility::none) return;
      hidden = seen == Visibility::some;
    }
    Span inner{row + i + kRows - 1 + a.band_low - start, row + i + a.band_high + 1 - start};
    int64_t first = round_down(band.first, kColumnStep<Mode>), last = round_up(band.last, kColumnStep<Mode>);
    hidden = hidden || (rules.hides && (first < band.first || last > band.last));
    bool fresh = !begun[i / kRows];
    if (fresh) begin(i);
    begun[i / kRows] = true;
    // What is left out of [first, last) is hidden, so the rules overwrite it.
    panel_product<Mode>(scores, kForwardKeys<Mode>, {queries + i * query_width, query_width, 1}, panels,
                        words<Mode>(a.depth), round_down(band.first, kLanes), round_up(band.last, kLanes));
    bool cut = first < most(band.first, inner.first) || last > least(band.last, inner.last);
    if (cut || hidden || rules.changes)
      apply_rules(rules, arrays, row + i, start, first, last, scores, kForwardKeys<Mode>);
    Dropout drop{arrays.keep ? arrays.keep + (row + i) * a.keep.query + start * a.keep.key : nullptr,
                 a.keep.query, a.keep.key, a.keys - start, rows - i, a.keep_scale};
    softmax_tile<Mode>(scores, weights, first, last, rules.changes ? 1.f : rules.exponent, rows_from(i), out_width,
                       fresh, drop);
    Left left{weights + words<Mode>(first), words<Mode>(kForwardKeys<Mode>), 1};
    Right right{values + words<Mode>(first) * out_width, out_width};
    auto product = fresh ? wide_product<Mode, kRows, false> : wide_product<Mode, kRows, true>;
    product(state.out + i * out_width, out_width, left, right, words<Mode>(band.last - first), out_width);
  }

  void attend_block(int64_t start, const float* panels, const float* values) {
    const AttentionArgs& a = *rules.args;
    Span band = band_span(a, row, rows, start, kForwardKeys<Mode>);
    if (band.first >= band.last) return;
    bool hidden = false;
    if (rules.hides) {
      Visibility seen = visibility(a, arrays, row, rows, start + band.first, band.last - band.first);
      if (seen == Visibility::none) return;
      hidden = seen == Visibility::some;
    }
    constexpr int64_t kKeys = kForwardKeys<Mode>;
    for (int64_t i = 0; i < rows; i += kRows) {
      i + kRows < rows ? prefetch_strip(a, arrays, row + i + kRows, start, kKeys)
                       : prefetch_strip(a, arrays, row, start + kKeys, kKeys);
      attend(i, start, hidden, panels, values);
    }
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
    float sums[kQueries], logs[kQueries];
    for (int64_t i = 0; i < kQueries; i++)
      sums[i] = i < rows && begun[i / kRows] ? reduce_add(load(state.sum + i * kLanes)) : 0.f;
    for (int64_t i = 0; i < kQueries; i += kLanes) store(logs + i, log2_fast(load(sums + i)));
    for (int64_t i = 0; i < rows; i++) {
      if (sums[i] == 0.f) {
        maximum[i] = empty_row(i);
        log_sum[i] = 0.f;
        continue;
      }
      write_row(i, state.out + i * out_width, 1.f / sums[i]);
      maximum[i] = state.maximum[i];
      log_sum[i] = logs[i];
    }
  }
};

template <class Mode>
void forward_block(const Rules& rules, const PackedKeys<Mode>& packed, int64_t slot, int64_t batch, int64_t head,
                   int64_t row, float* memory) {
  const AttentionArgs& a = *rules.args;
  QueryBlock<Mode> block(rules, batch, head, row, memory);
  Span band = band_span(a, row, block.rows, 0, a.keys);
  constexpr int64_t kStep = kForwardKeys<Mode>;
  for (int64_t start = band.first / kStep * kStep; start < band.last; start += kStep)
    block.attend_block(start, packed.panels(slot, start), packed.values(slot, start));
  block.finish();
}

// Each task packs a kv head's keys and values into its own memory and runs the head's query blocks.
template <class Mode>
void forward_heads(const Rules& rules, const PackedKeys<Mode>& shape, const Parallel& par) {
  const AttentionArgs& a = *rules.args;
  int64_t scratch = round_up(QueryBlock<Mode>::scratch(a), 16), share = a.heads / a.kv_heads;
  for_heads(par, a.batch * a.kv_heads, [&](int64_t kv) {
    auto memory = static_cast<float*>(thread_arena((scratch + shape.size) * sizeof(float)));
    PackedKeys<Mode> packed = shape;
    packed.data = memory + scratch;
    for (int64_t key = 0; key < a.keys; key += kForwardKeys<Mode>) packed.pack(0, kv, key);
    for (int64_t member = 0; member < share; member++)
      for (int64_t row = 0; row < a.queries; row += kQueries)
        forward_block<Mode>(rules, packed, 0, kv / a.kv_heads, kv % a.kv_heads * share + member, row, memory);
  });
}

// Long or few heads, a wave at a time: pack their keys and values, then run their query blocks, the last (under a causal
// band the longest) first.
template <class Mode>
void forward_waves(const Rules& rules, PackedKeys<Mode>& packed, const Parallel& par) {
  const AttentionArgs& a = *rules.args;
  int64_t kv_heads = a.batch * a.kv_heads, share = a.heads / a.kv_heads;
  int64_t wave = wave_heads(kv_heads, packed.size, par);
  int64_t key_blocks = packed.padded_keys / kForwardKeys<Mode>, query_blocks = (a.queries + kQueries - 1) / kQueries;
  packed.data = static_cast<float*>(acquire_workspace(wave * packed.size * sizeof(float)));
  for (int64_t base = 0; base < kv_heads; base += wave) {
    int64_t count = least(wave, kv_heads - base);
    parallel_for(par, count * key_blocks, [&](int64_t t) {
      packed.pack(t / key_blocks, base + t / key_blocks, t % key_blocks * kForwardKeys<Mode>);
    });
    parallel_for(par, count * share * query_blocks, [&](int64_t t) {
      int64_t slot = t / (share * query_blocks), member = t / query_blocks % share, kv = base + slot;
      forward_block<Mode>(rules, packed, slot, kv / a.kv_heads, kv % a.kv_heads * share + member,
                          (query_blocks - 1 - t % query_blocks) * kQueries,
                          static_cast<float*>(thread_arena(QueryBlock<Mode>::scratch(a) * sizeof(float))));
    });
  }
  release_workspace(packed.data);
}

template <class Mode>
void forward(const AttentionArgs& args, const Parallel& par) {
  Rules rules = make_rules<Mode>(args);
  PackedKeys<Mode> packed(args);
  if (whole_heads(args.batch * args.kv_heads, packed.size, par))
    forward_heads(rules, packed, par);
  else
    forward_waves(rules, packed, par);
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
