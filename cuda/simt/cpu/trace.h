// What the threads of one block did while Options.trace was set, in the order in which the model ran them: waits, arrivals,
// copies and products. An order, not times; cuda/timeline.py makes a picture of it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

// kind                       first                    second
// "mbarrier init"            its offset               arrivals it expects
// "mbarrier arrive"          its offset               bytes announced
// "mbarrier expect"          its offset               bytes announced
// "mbarrier wait"            its offset               parity
// "load"                     its mbarrier's offset    bytes
// "store"                    0                        bytes
// "store commit", "store wait"                        0, the groups that may be left
// "wgmma"                    n                        1 if A comes from registers
// "wgmma commit", "wgmma wait"                        0, the groups that may be left
// "barrier sync", "barrier arrive"  number            threads, 0 for all
struct TraceEvent {
  unsigned block, thread;  // numbers of the block in the grid, of the thread in the block
  const char* kind;
  int64_t first, second;
  const char* file;
  int line;
};

std::vector<TraceEvent> take_trace();  // of this OS thread's launches since the last call

}  // namespace simt
