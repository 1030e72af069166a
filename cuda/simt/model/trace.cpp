// The list behind cpu/trace.h. A launch that is traced runs on one OS thread (launch.cpp).
#include "trace.h"

#include "state.h"

namespace simt {

namespace {
std::vector<TraceEvent>& events() {
  static thread_local std::vector<TraceEvent> list;
  return list;
}
}  // namespace

std::vector<TraceEvent> take_trace() { return std::exchange(events(), {}); }

namespace model {

void trace_event(const char* kind, int64_t first, int64_t second, Site site) {
  const Thread& thread = *self();
  const uint3 at = thread.block_index;
  const dim3 grid = thread.grid_size;
  events().push_back({(at.z * grid.y + at.y) * grid.x + at.x, thread.linear, kind, first, second, site.file, site.line});
}

}  // namespace model
}  // namespace simt
