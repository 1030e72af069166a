// What the checked build counted while Options.counters was set: requests of warps to memory and what they cost,
// copies, matrix instructions and waits, by source line.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

// `kind` says what `actual` and `ideal` are, summed over the requests:
//   global read, global write             a request is one instruction of a warp: 32-byte sectors moved; the fewest
//                                         that hold the bytes asked for
//   shared read, shared write, remote ..  passes over the 32 banks; the fewest for that many bytes (remote: a peer's)
//   tma, cp.async                         bytes (ideal: the same)
//   wgmma, mma, atomic                    instructions (an atomic counts for each thread)
//   barrier, mbarrier                     waits, one for each thread
struct CounterRow {
  std::string file;
  int line;
  std::string kind;
  uint64_t requests;
  uint64_t bytes;  // asked for by the threads
  uint64_t actual, ideal;
};

// Since the last call; ordered by file, line and kind. Accesses are those of the source as g++ -O1 leaves them: nvcc
// may make one wide access of neighbouring ones. The fast build counts nothing.
std::vector<CounterRow> take_counters();

}  // namespace simt
