// Which keys a query attends, and what is done to a score before its exponential.
#pragma once
#include "attention.h"
#include "attention_tile.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
// Below every score in use and above -inf, so that differences of two such bounds stay finite.
constexpr float kLowestScore = -3e38f;
constexpr float kBelowScores = -3.3e38f;
const float kInfinity = __builtin_inff();

// What holds for a whole call. Raw products (packed q times packed k) become base-2 exponents times `exponent`.
struct Rules {
  const AttentionArgs* args;
  float query_scale;  // folded into packed q; 1 where packed q stays exact
  float exponent;     // raw product -> base-2 exponent
  float natural;      // raw product -> scaled score
  bool hides;         // mask or segments
  bool changes;       // soft cap, bias, or a scale whose sign would turn the row maximum round
};

template <class Mode>
Rules make_rules(const AttentionArgs& args) {
  Rules r{&args, args.scale * kLog2E, 1.f, kLn2, args.mask.data || args.query_segments.data,
          args.soft_cap != 0.f || args.bias.data};
  if (Mode::kPaired) {
    r.query_scale = 1.f;
    r.exponent = args.scale * kLog2E;
    r.natural = args.scale;
    r.changes = r.changes || !(args.scale > 0.f);
  }
  return r;
}

// The score arrays of one (batch, head): rows of `query` elements apart.
struct HeadArrays {
  const uint8_t *mask, *keep;
  const char* bias;
  const int32_t *query_segments, *key_segments;
};

int64_t head_offset(const AttentionArgs& args, const AttentionBroadcast& a, int64_t batch, int64_t head) {
  int64_t offset = head * a.head;
  for (int64_t d = args.leading_rank - 1; d >= 0; d--) {
    offset += batch % args.leading[d] * a.leading[d];
    batch /= args.leading[d];
  }
  return offset;
}

template <class T>
const T* head_data(const AttentionArgs& args, const AttentionBroadcast& a, int64_t batch, int64_t head,
                          int64_t scale = 1) {
  return a.data ? static_cast<const T*>(a.data) + head_offset(args, a, batch, head) * scale : nullptr;
}

int64_t bias_bytes(const AttentionArgs& args) { return args.bias.element == AttentionElement::f32 ? 4 : 2; }

HeadArrays head_arrays(const AttentionArgs& args, int64_t batch, int64_t head) {
  return {head_data<uint8_t>(args, args.mask, batch, head), head_data<uint8_t>(args, args.keep, batch, head),
          head_data<char>(args, args.bias, batch, head, bias_bytes(args)),
          head_data<int32_t>(args, args.query_segments, batch, head),
          head_data<int32_t>(args, args.key_segments, batch, head)};
}

// Keys [first, last) of a key block that starts at `start`, for queries [row, row + rows).
struct Span {
  int64_t first, last;
};
Span band_span(const AttentionArgs& args, int64_t row, int64_t rows, int64_t start, int64_t keys) {
  return {most(row + args.band_low, start) - start,
          least(least(row + rows - 1 + args.band_high + 1, args.keys), start + keys) - start};
}

enum class Visibility { none, some, all };

Visibility mask_visibility(const AttentionArgs& args, const uint8_t* mask, int64_t row, int64_t rows,
                                  int64_t start, int64_t keys) {
  int64_t height = args.mask.query ? rows : 1, width = args.mask.key ? keys : 1;
  unsigned any = 0, all = 1;
  for (int64_t i = 0; i < height && (all || !any); i++) {
    const uint8_t* line = mask + (row + i) * args.mask.query + start * args.mask.key;
    for (int64_t j = 0; j < width; j++) {
      any |= line[j];
      all &= line[j];
    }
  }
  return all ? Visibility::all : any ? Visibility::some : Visibility::none;
}

Visibility segment_visibility(const HeadArrays& head, int64_t row, int64_t rows, int64_t start, int64_t keys) {
  int32_t q0 = INT32_MAX, q1 = INT32_MIN, k0 = INT32_MAX, k1 = INT32_MIN;
  for (int64_t i = row; i < row + rows; i++) {
    int32_t s = head.query_segments[i];
    q0 = s < q0 ? s : q0;
    q1 = s > q1 ? s : q1;
  }
  for (int64_t j = start; j < start + keys; j++) {
    int32_t s = head.key_segments[j];
    k0 = s < k0 ? s : k0;
    k1 = s > k1 ? s : k1;
  }
  if (q1 < k0 || k1 < q0) return Visibility::none;
  return q0 == q1 && k0 == k1 && q0 == k0 ? Visibility::all : Visibility::some;
}

void prefetch_lines(const char* data, int64_t rows, int64_t stride, int64_t bytes) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(data + i * stride + x);
}

// Asks for the mask, bias and dropout of the strip that comes next: T x S arrays stream from memory, a few lines a row,
// and more than a strip's at once would only queue.
void prefetch_strip(const AttentionArgs& args, const HeadArrays& head, int64_t row, int64_t start, int64_t keys) {
  int64_t rows = least(args.queries - row, kRows), columns = least(args.keys - start, keys);
  if (rows <= 0 || columns <= 0) return;
  auto flags = [&](const uint8_t* data, const AttentionBroadcast& a) {
    if (data && a.query && a.key)
      prefetch_lines(reinterpret_cast<const char*>(data) + row * a.query + start, rows, a.query, columns);
  };
  flags(head.mask, args.mask);
  flags(head.keep, args.keep);
  int64_t size = bias_bytes(args);
  if (head.bias && args.bias.query && args.bias.key)
    prefetch_lines(head.bias + (row * args.bias.query + start) * size, rows, args.bias.query * size, columns * size);
}

// What mask and segments leave of a block of queries and keys; the band is not asked.
Visibility visibility(const AttentionArgs& args, const HeadArrays& head, int64_t row, int64_t rows,
                             int64_t start, int64_t keys) {
  Visibility seen = Visibility::all;
  if (head.query_segments) seen = segment_visibility(head, row, rows, start, keys);
  if (head.mask && seen != Visibility::none) {
    Visibility m = mask_visibility(args, head.mask, row, rows, start, keys);
    if (m != Visibility::all) seen = m;
  }
  return seen;
}

// Whether row attends key, asked one by one where speed does not matter.
bool attends(const AttentionArgs& args, const HeadArrays& head, int64_t row, int64_t key) {
  if (key - row < args.band_low || key - row > args.band_high) return false;
  if (head.query_segments && head.query_segments[row] != head.key_segments[key]) return false;
  return !head.mask || head.mask[row * args.mask.query + key * args.mask.key];
}

// As visibility, of a strip of rows inside a block: columns at either end of `span` that no row's segment has are cut off.
Visibility strip_visibility(const AttentionArgs& args, const HeadArrays& head, int64_t row, int64_t rows, int64_t start,
                            Span& span) {
  if (head.query_segments) {
    int32_t q0 = INT32_MAX, q1 = INT32_MIN;
    for (int64_t i = row; i < row + rows; i++) {
      int32_t s = head.query_segments[i];
      q0 = s < q0 ? s : q0;
      q1 = s > q1 ? s : q1;
    }
    const int32_t* ids = head.key_segments + start;
    while (span.first < span.last && (ids[span.first] < q0 || ids[span.first] > q1)) span.first++;
    while (span.first < span.last && (ids[span.last - 1] < q0 || ids[span.last - 1] > q1)) span.last--;
  }
  if (span.first >= span.last) return Visibility::none;
  return visibility(args, head, row, rows, start + span.first, span.last - span.first);
}

// A tile's last vectors may lie behind the keys: n, the keys left, may be negative.
constexpr int64_t kept_lanes(int64_t n) { return least(most(n, 0), kLanes); }

// The first n of kLanes bytes from p on (step 1) or *p in every lane (step 0), as 0 or -1.
JAXEXT_INLINE vi load_flags(const uint8_t* p, int64_t step, int64_t n) {
  if (!step) return splat_i(*p ? -1 : 0);
  __m128i x{};
  n >= kLanes ? memcpy(&x, p, kLanes) : memcpy(&x, p, kept_lanes(n));
  // Intrinsics: GCC 12 widens bytes one by one through memory when asked by __builtin_convertvector.
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(x) != 0;
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(x) != 0;
#else
  return (vi)_mm_cvtepu8_epi32(x) != 0;
#endif
}

JAXEXT_INLINE vf load_bias(const AttentionArgs& args, const char* p, int64_t n) {
  bool wide = args.bias.element == AttentionElement::f32;
  auto *floats = reinterpret_cast<const float*>(p);
  auto *halves = reinterpret_cast<const bf16*>(p);
  if (!args.bias.key) {
    if (wide) return splat(*floats);
    uint32_t bits = static_cast<uint32_t>(*halves) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return splat(x);
  }
  n = kept_lanes(n);
  if (wide) return n == kLanes ? load(floats) : load_first(floats, n);
  return n == kLanes ? load(halves) : load_first(halves, n);
}

// Lanes of columns [column, column + kLanes) that lie in [low, high].
JAXEXT_INLINE vi lanes_between(int64_t low, int64_t high, int64_t column) {
  vi lane = lane_index();
  return (lane >= splat_i(static_cast<int32_t>(least(most(low - column, 0), kLanes)))) &
         (lane <= splat_i(static_cast<int32_t>(most(least(high - column, kLanes), -1))));
}

// x where segments and mask let query `row` see keys [key, key + kLanes), -inf elsewhere.
JAXEXT_INLINE vf hide(const AttentionArgs& args, const HeadArrays& head, int64_t row, int64_t key, vf x) {
  int64_t n = args.keys - key;
  const int32_t* ids = head.key_segments + key;
  const uint8_t* flags = head.mask + row * args.mask.query + key * args.mask.key;
#if defined(__AVX512F__)
  // In mask registers throughout: the compiler takes comparisons of vector types through full vectors.
  __mmask16 seen = (__mmask16)((1u << kept_lanes(n)) - 1);
  if (head.query_segments) {
    touch(ids, kept_lanes(n) * sizeof *ids);
    seen = _mm512_mask_cmpeq_epi32_mask(seen, _mm512_maskz_loadu_epi32(seen, ids),
                                        _mm512_set1_epi32(head.query_segments[row]));
  }
  if (head.mask && !args.mask.key) seen = *flags ? seen : 0;
  if (head.mask && args.mask.key) {
    touch(flags, kept_lanes(n));
    __m128i bytes = _mm_maskz_loadu_epi8(seen, flags);
    seen = _mm_test_epi8_mask(bytes, bytes);
  }
  return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), seen, (__m512)x);
#else
  vi seen = splat_i(-1);
  if (head.query_segments) {
    vi k{};
    n >= kLanes ? memcpy(&k, ids, sizeof k) : memcpy(&k, ids, kept_lanes(n) * sizeof(int32_t));
    seen = k == splat_i(head.query_segments[row]);
  }
  if (head.mask) seen &= load_flags(flags, args.mask.key, n);
  return select(seen, x, splat(-kInfinity));
#endif
}

// tanh, relative error about 2e-7: an odd polynomial near 0, elsewhere 1 - 2 / (e^2x + 1).
JAXEXT_INLINE vf tanh_fast(vf x) {
  vf a = (vf)((vi)x & splat_i(0x7fffffff)), y = x * x;
  vf p = fma(splat(-5.70498872745e-3f), y, splat(2.06390887954e-2f));
  p = fma(p, y, splat(-5.37397155531e-2f));
  p = fma(p, y, splat(1.33314422036e-1f));
  p = fma(p, y, splat(-3.33332819422e-1f));
  vf near = fma(p * y, x, x);
  vf e = exp2_fast<Float32>(select(a > splat(20.f), splat(20.f), a) * splat(2.f * kLog2E));
  vf far = splat(1.f) - splat(2.f) / (e + splat(1.f));
  far = (vf)((vi)far | ((vi)x & splat_i(INT32_MIN)));
  return select(a < splat(0.625f), near, far);
}

// A raw product through soft cap and bias to a base-2 exponent; `slope` takes the derivative of the soft cap.
JAXEXT_INLINE vf change_scores(const Rules& rules, const HeadArrays& head, int64_t row, int64_t key, vf x,
                               float* slope) {
  const AttentionArgs& args = *rules.args;
  if (args.soft_cap != 0.f) {
    vf t = tanh_fast(x * splat(rules.natural / args.soft_cap));
    x = t * splat(args.soft_cap * kLog2E);
    if (slope) store(slope, splat(1.f) - t * t);
  } else {
    x = x * splat(rules.exponent);
  }
  if (!head.bias) return x;
  const char* p = head.bias + (row * args.bias.query + key * args.bias.key) * bias_bytes(args);
  vf bias = load_bias(args, p, args.keys - key), y = fma(bias, splat(kLog2E), x);
  vf bounded = select(y < splat(kLowestScore), splat(kLowestScore), y);
  // A finite bias as low as the type allows must not become -inf; a bias of -inf must stay it.
  return select(bias == splat(-kInfinity), splat(-kInfinity), bounded);
}

template <bool kChanges, bool kHides>
JAXEXT_NOINLINE void apply_chosen_rules(const Rules& rules, const HeadArrays& head, int64_t row, int64_t start,
                                        int64_t first, int64_t last, float* scores, int64_t width, float* slope) {
  const AttentionArgs& args = *rules.args;
  for (int64_t r = 0; r < kRows; r++) {
    int64_t i = least(row + r, args.queries - 1);  // padding rows repeat the last
    int64_t low = i + args.band_low - start, high = least(i + args.band_high, args.keys - 1) - start;
    for (int64_t c = first; c < last; c += kLanes) {
      float* p = scores + r * width + c;
      vf x = load(p);
      if (kChanges) x = change_scores(rules, head, i, start + c, x, slope ? slope + r * width + c : nullptr);
      if (c < low || c + kLanes - 1 > high) x = select(lanes_between(low, high, c), x, splat(-kInfinity));
      if (kHides) x = hide(args, head, i, start + c, x);
      store(p, x);
    }
  }
}

// Turns raw products of queries [row, row + kRows) and keys start + [first, last) into what the exponential takes:
// keys outside the band become -inf, where rules.hides also those that segments or mask hide, and where rules.changes
// soft cap and bias are applied and the result is a base-2 exponent.
void apply_rules(const Rules& rules, const HeadArrays& head, int64_t row, int64_t start, int64_t first, int64_t last,
                 float* scores, int64_t width, float* slope = nullptr) {
  if (rules.changes && rules.hides)
    apply_chosen_rules<true, true>(rules, head, row, start, first, last, scores, width, slope);
  else if (rules.changes)
    apply_chosen_rules<true, false>(rules, head, row, start, first, last, scores, width, slope);
  else if (rules.hides)
    apply_chosen_rules<false, true>(rules, head, row, start, first, last, scores, width, slope);
  else
    apply_chosen_rules<false, false>(rules, head, row, start, first, last, scores, width, slope);
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
