// cumsum of float32, added in the order of XLA's own (reduce_window_rewriter.cc), hence with the same bits: blocks of 16 are
// summed from their first element on, the sums of blocks are scanned in the same way, and what precedes a block is added last.
// In reverse an element's sum starts at itself and runs to its block's end. Lanes that a sum passes by add -0, which changes nothing.
#pragma once
#include "cpu/cumulative_tasks.h"
#include "cpu/rows.h"

namespace jaxext::JAXEXT_ISA {
namespace {

constexpr int64_t kBlock = 16, kGroup = kBlock * kBlock, kChunk = kBlock * kGroup;
constexpr int64_t kSumElements = 1 << 14;    // of a task, at least
constexpr int kRegisters = kBlock / kLanes;  // of a block

// Element j of a register, in the lanes whose sums it is part of.
template <bool kReverse>
JAXEXT_INLINE vf for_lanes(float x, int j) {
  const vi taken = kReverse ? lane_index() <= j : lane_index() >= j;
  return (vf)(((vi)splat(x) & taken) | (~taken & splat_i(INT32_MIN)));
}

// out = each block's own running sums; sums = the blocks' whole ones.
template <bool kReverse, int kBlocks>
JAXEXT_INLINE void within_blocks(const float* x, float* out, float* sums) {
  vf sum[kBlocks];
  for (int b = 0; b < kBlocks; b++) sum[b] = vf{};
  JAXEXT_UNROLL for (int r = 0; r < kRegisters; r++) {
    JAXEXT_UNROLL for (int j = 0; j < kLanes; j++)
      JAXEXT_UNROLL for (int b = 0; b < kBlocks; b++)
        sum[b] += for_lanes<kReverse>(x[b * kBlock + r * kLanes + j], j);
    if constexpr (kReverse)
      JAXEXT_UNROLL for (int j = (r + 1) * kLanes; j < kBlock; j++)
        JAXEXT_UNROLL for (int b = 0; b < kBlocks; b++) sum[b] += splat(x[b * kBlock + j]);
    JAXEXT_UNROLL for (int b = 0; b < kBlocks; b++) {
      store(out + b * kBlock + r * kLanes, sum[b]);
      if (kReverse ? r == 0 : r == kRegisters - 1) sums[b] = sum[b][kReverse ? 0 : kLanes - 1];
      sum[b] = kReverse ? vf{} : splat(sum[b][kLanes - 1]);
    }
  }
}

// The same of n elements, a last block's missing ones being zeros.
template <bool kReverse>
void within(const float* x, int64_t n, float* out, float* sums) {
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; i + kAtOnce * kBlock <= n; i += kAtOnce * kBlock)
    within_blocks<kReverse, kAtOnce>(x + i, out + i, sums + i / kBlock);
  for (; i + kBlock <= n; i += kBlock) within_blocks<kReverse, 1>(x + i, out + i, sums + i / kBlock);
  if (i == n) return;
  float padded[kBlock] = {};
  memcpy(padded, x + i, (n - i) * sizeof(float));
  within_blocks<kReverse, 1>(padded, padded, sums + i / kBlock);
  memcpy(out + i, padded, (n - i) * sizeof(float));
}

// Adds to each block what precedes it.
void onto_blocks(float* out, int64_t n, const float* before) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock)
    JAXEXT_UNROLL for (int r = 0; r < kRegisters; r++)
      store(out + i + r * kLanes, load(out + i + r * kLanes) + splat(before[i / kBlock]));
  for (; i < n; i++) out[i] += before[i / kBlock];
}

// The scan of sums of blocks, of sums of those and so on, one at a time: kWidth rows side by side.
template <bool kReverse, int kWidth>
class Ladder {
  struct Rung {
    float block[kBlock][kWidth], own[kWidth], sum[kWidth], before[kWidth];
  };
  static constexpr int kRungs = 11;  // 16^11 elements and more
  Rung rungs_[kRungs];
  int ready_ = 0;  // rungs that hold zeros or sums

 public:
  // Sum number `at` joins; returns the scan there.
  const float* push(int64_t at, const float* value, int level = 0) {
    Rung& rung = rungs_[level];
    if (level == ready_) {
      memset(&rung, 0, sizeof rung);
      ready_++;
    }
    const int64_t j = at % kBlock, first = kReverse ? j : 0, last = kReverse ? kBlock - 1 : j;
    memcpy(rung.block[j], value, sizeof rung.own);
    memset(rung.own, 0, sizeof rung.own);
    for (int64_t i = first; i <= last; i++)
      for (int c = 0; c < kWidth; c++) rung.own[c] += rung.block[i][c];
    for (int c = 0; c < kWidth; c++) rung.sum[c] = rung.own[c] + rung.before[c];
    if (kReverse ? j == 0 && at > 0 : j == kBlock - 1)
      memcpy(rung.before, push(at / kBlock, rung.own, level + 1), sizeof rung.before);
    return rung.sum;
  }
};

// A row, in chunks that the first cache holds. Memory is read and written upwards in reverse too: it is prefetched so.
template <bool kReverse>
class RowSum {
  Ladder<kReverse, 1> ladder_;
  float above_ = 0, before_ = 0;  // of the next group, of the next block

  // What precedes each of a group's blocks, of their sums.
  void scan_group(const float* sums, int64_t blocks, int64_t group, float* preceding) {
    float scan[kBlock], whole;
    within_blocks<kReverse, 1>(sums, scan, &whole);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t neighbour = kReverse ? b + 1 : b - 1;
      preceding[b] = neighbour < 0 || neighbour == blocks ? before_ : scan[neighbour] + above_;
    }
    before_ = scan[kReverse ? 0 : blocks - 1] + above_;
    above_ = *ladder_.push(group, &whole);
  }

 public:
  void run(const float* x, int64_t n, float* out) {
    for (int64_t i = 0, chunks = (n + kChunk - 1) / kChunk; i < chunks; i++) {
      const int64_t first = (kReverse ? chunks - 1 - i : i) * kChunk, count = n - first < kChunk ? n - first : kChunk;
      const int64_t blocks = (count + kBlock - 1) / kBlock, groups = (blocks + kBlock - 1) / kBlock;
      float sums[kBlock * kBlock], preceding[kBlock * kBlock];
      within<kReverse>(x + first, count, out + first, sums);
      memset(sums + blocks, 0, (groups * kBlock - blocks) * sizeof(float));
      for (int64_t k = 0; k < groups; k++) {
        const int64_t at = (kReverse ? groups - 1 - k : k) * kBlock;
        scan_group(sums + at, blocks - at < kBlock ? blocks - at : kBlock, (first / kBlock + at) / kBlock, preceding + at);
      }
      onto_blocks(out + first, count, preceding);
    }
  }
};

template <bool kReverse>
void sum_row(const float* x, int64_t n, float* out) {
  float whole;
  if (n <= kBlock) return within<kReverse>(x, n, out, &whole);
  RowSum<kReverse>().run(x, n, out);
}

// Several threads at one row: the blocks, the scan of their sums by one of the threads, and what precedes each.
template <bool kReverse>
void sum_shared_row(const float* x, int64_t n, float* out, const Parallel& par) {
  const int64_t blocks = (n + kBlock - 1) / kBlock, tasks = (n + kSumElements - 1) / kSumElements;
  auto* sums = static_cast<float*>(thread_arena((blocks + 2) * sizeof(float))) + 1;
  auto length = [&](int64_t first) { return n - first < kSumElements ? n - first : kSumElements; };
  parallel_for(par, tasks, [&](int64_t task) {
    const int64_t first = task * kSumElements;
    within<kReverse>(x + first, length(first), out + first, sums + first / kBlock);
  });
  sum_row<kReverse>(sums, blocks, sums);
  sums[-1] = sums[blocks] = 0;
  parallel_for(par, tasks, [&](int64_t task) {
    const int64_t first = task * kSumElements;
    onto_blocks(out + first, length(first), sums + first / kBlock + (kReverse ? 1 : -1));
  });
}

template <bool kReverse>
void sum_rows(const CumulativeArgs& a, const Parallel& par) {
  const auto* x = static_cast<const float*>(a.x);
  auto* out = static_cast<float*>(a.out);
  if (threads_share_rows(a, par)) {
    for (int64_t r = 0; r < a.outer; r++) sum_shared_row<kReverse>(x + r * a.n, a.n, out + r * a.n, par);
    return;
  }
  parallel_rows(par, a.outer, a.n, kSumElements, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; r++) sum_row<kReverse>(x + r * a.n, a.n, out + r * a.n);
  });
}

// One block of `rows` rows of a tile of columns; sums = the whole ones.
template <bool kReverse>
JAXEXT_INLINE void block_of_columns(const float* x, float* out, int64_t rows, int64_t stride, int64_t width,
                                    const float* before, float* sums) {
  over_row(width, [&](int64_t j, auto part, int) __attribute__((always_inline)) {
    if constexpr (kReverse) {
      vf sum[kBlock] = {};
      auto add = [&](int64_t i, int64_t first) {
        const vf term = i < rows ? part.get(x + i * stride + j) : vf{};
        for (int64_t r = first; r <= i; r++) sum[r] += term;
      };
      JAXEXT_UNROLL for (int i = 0; i < kBlock; i++) add(i, 0);
      JAXEXT_UNROLL for (int r = 0; r < kBlock; r++)
        if (r < rows) part.put(out + r * stride + j, sum[r] + load(before + j));
      store(sums + j, sum[0]);
    } else {
      vf sum = {};
      for (int64_t r = 0; r < rows; r++) {
        sum += part.get(x + r * stride + j);
        part.put(out + r * stride + j, sum + load(before + j));
      }
      store(sums + j, sum);
    }
  });
}

template <bool kReverse>
void sum_columns(const CumulativeArgs& a, const Parallel& par) {
  const int64_t blocks = (a.n + kBlock - 1) / kBlock;
  parallel_columns(a, par, [&](int64_t at, int64_t width) {
    Ladder<kReverse, kColumns> ladder;
    float before[kColumns] = {}, sums[kColumns] = {};
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t block = kReverse ? blocks - 1 - i : i, row = block * kBlock;
      const int64_t rows = a.n - row < kBlock ? a.n - row : kBlock, begin = at + row * a.inner;
      block_of_columns<kReverse>(static_cast<const float*>(a.x) + begin, static_cast<float*>(a.out) + begin, rows,
                                 a.inner, width, before, sums);
      memcpy(before, ladder.push(block, sums), sizeof before);
    }
  });
}

void sum_of_floats(const CumulativeArgs& a, const Parallel& par) {
  if (a.inner == 1) return a.reverse ? sum_rows<true>(a, par) : sum_rows<false>(a, par);
  a.reverse ? sum_columns<true>(a, par) : sum_columns<false>(a, par);
}

}  // namespace
}  // namespace jaxext::JAXEXT_ISA
