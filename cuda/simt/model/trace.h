// How the model records an event for cpu/trace.h, where that is asked for.
#pragma once
#include "../cpu/trace.h"
#include "state.h"

namespace simt::model {

void trace_event(const char* kind, int64_t first, int64_t second, Site site);
inline void trace(const char* kind, int64_t first, int64_t second, Site site) {
  if (__builtin_expect(worker->options.trace, false)) trace_event(kind, first, second, site);
}
inline int64_t offset_of(const void* shared) { return static_cast<const char*>(shared) - self()->cta->shared; }

}  // namespace simt::model
