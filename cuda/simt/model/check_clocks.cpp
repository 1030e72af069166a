// How clocks are joined: cheap where threads that know the same learn the same.
#if defined(SIMT_CHECKED)
#include "check_clocks.h"

#include "state.h"

namespace simt::model::check {

Clocks clocks;

namespace {

uint64_t serials = 0;

// The last joins: threads that move together ask for the same one again and again.
struct Join {
  Known a, b, result;
} last_joins[4];
unsigned next_join = 0;
struct Entry {
  Known a, result;
  uint32_t agent = 0, tick = 0;
} last_entry;

// A vector that may be changed.
Ticks& own(Known& known, size_t size) {
  if (!known) known = std::make_shared<Ticks>();
  else if (known.use_count() > 1) known = std::make_shared<Ticks>(*known);
  if (known->size() < size) known->resize(size);
  return *known;
}

bool contains(const Ticks& big, const Ticks& small) {
  for (size_t i = 0; i < small.size(); ++i)
    if (small[i] > (i < big.size() ? big[i] : 0)) return false;
  return true;
}

void maximum(Ticks& into, const Ticks& from) {
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

void join(Known& into, const Known& from) {
  if (!from || into == from) return;
  if (!into) {
    into = from;
    return;
  }
  for (const Join& j : last_joins)
    if (j.a == into && j.b == from) {
      into = j.result;
      return;
    }
  Known result;
  if (contains(*from, *into)) result = from;
  else if (contains(*into, *from)) result = into;
  else {
    result = std::make_shared<Ticks>(*into);
    if (result->size() < from->size()) result->resize(from->size());
    maximum(*result, *from);
  }
  last_joins[next_join++ % 4] = {into, from, result};
  into = result;
}

void learn(Known& into, uint32_t agent, uint32_t tick) {
  if (tick_of(into, agent) >= tick) return;
  if (last_entry.result && last_entry.a == into && last_entry.agent == agent && last_entry.tick == tick) {
    into = last_entry.result;
    return;
  }
  Known before = into;
  own(into, agent + 1)[agent] = tick;
  last_entry = {before, into, agent, tick};
}

void add(Known& sum, Known& last, const Known& from) {
  if (!from || from == last || from == sum) return;
  last = from;
  if (!sum) {
    sum = from;
    return;
  }
  if (sum.use_count() > 1 && contains(*sum, *from)) return;
  maximum(own(sum, from->size()), *from);
}

void add_entry(Known& sum, uint32_t agent, uint32_t tick) {
  if (tick > tick_of(sum, agent)) own(sum, agent + 1)[agent] = tick;
}

void join(Foreign& into, const Foreign& from) {
  if (!from || into == from) return;
  if (!into) {
    into = from;
    return;
  }
  auto both = std::make_shared<std::vector<Earlier>>();
  both->reserve(std::max(into->size(), from->size()));
  auto a = into->begin(), b = from->begin();
  while (a != into->end() || b != from->end()) {
    if (b == from->end() || (a != into->end() && a->gang < b->gang)) both->push_back(*a++);
    else if (a == into->end() || b->gang < a->gang) both->push_back(*b++);
    else {
      both->push_back(*a++);
      join(both->back().known, b->known);
      join(both->back().passed, (b++)->passed);
    }
  }
  into = both;
}

void add(Clock& sum, const Clock& from) {
  if (!sum.serial) sum.serial = ++serials;
  add(sum.known, sum.last_known, from.known);
  add(sum.fenced, sum.last_fenced, from.fenced);
  add(sum.visible, sum.last_visible, from.visible);
  add(sum.passed, sum.last_passed, from.passed);
  if (from.self != nobody) {
    add_entry(sum.known, from.self, from.tick);
    add_entry(sum.fenced, from.self, from.fenced_tick);
    add_entry(sum.visible, from.self, from.visible_tick);
  }
  join(sum.foreign, from.foreign);
}

void learn(Clock& clock, const Clock& sum) {
  join(clock.known, sum.known);
  join(clock.fenced, sum.fenced);
  join(clock.visible, sum.visible);
  join(clock.passed, sum.passed);
  join(clock.foreign, sum.foreign);
}

Clock& clock_of(const Thread& thread) { return clocks.thread[thread.index].clock; }

}  // namespace simt::model::check
#endif
