// Element by element: rows are cut into segments, one for each warp or part of one. Contiguous arrays are one long row.
// All chunks of a thread are asked for before the first is used: two or four of each input.
#pragma once
#include "fused/rows.cuh"

namespace fused {

constexpr int segment_threads = 256;

// The segments of `rows` rows of `width` elements, `length` elements each but for the last of a row.
struct Segments {
  int64_t width;
  int team, length;
  unsigned of_row;  // segments of a row
  int64_t all;

  // This thread's segment: false if there is none. `first` is the column where it starts.
  template <class T, int n>
  __device__ __forceinline__ bool take(int& row, int64_t& first, Span<T, n>& span) const {
    const Team mine(team);
    const int64_t segment = int64_t(blockIdx.x) * mine.count + mine.index;
    if (segment >= all) return false;
    if (all == of_row) {
      row = 0;
      first = segment * length;
    } else {
      row = int(unsigned(segment) / of_row);
      first = int64_t(unsigned(segment) % of_row) * length;
    }
    span = {int(min(width - first, int64_t(length))), mine.size, mine.rank};
    return true;
  }
};

// Chunks of n elements, `chunks` of them a thread.
template <int n>
Segments segments_of(const View& x, int64_t rows, int64_t width, int chunks) {
  Segments s = {width, 1, 0, 0, 0};
  while (s.team < 32 && s.team * n < width) s.team *= 2;
  s.length = s.team * n * chunks;
  const int64_t of_row = divide_up(width, s.length);
  s.all = rows * of_row;
  if (s.all >= int64_t(1) << 31)
    x.refuse("shape " + x.shape() + ": expected less than 2^31 segments of " + std::to_string(s.length) + " elements");
  s.of_row = unsigned(of_row);
  return s;
}

inline simt::Launch launch_of(const Segments& s, void* stream) {
  return launch_of(divide_up(s.all, segment_threads / s.team), segment_threads, stream);
}

}  // namespace fused
