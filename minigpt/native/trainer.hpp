// Training: pre-tokens counted by several threads, then merges with incremental pair counts (the algorithm of
// minigpt/bpe.py). Symbols 0..255 are the bytes in the order in which ties are decided; symbol 256 + m is merge m.
#pragma once

#include <algorithm>
#include <queue>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "maps.hpp"
#include "splitter.hpp"

namespace bpe {

struct WordCounts {
  ByteMap words;
  std::vector<int64_t> counts;

  void add(const char* p, size_t n, int64_t count) {
    const uint32_t index = words.find_or_insert(p, n);
    if (index == counts.size()) counts.push_back(0);
    counts[index] += count;
  }

  void split(const Splitter& splitter, std::string_view text) {
    const char* end = text.data() + text.size();
    for (const char *p = text.data(), *q; p < end; p = q) {
      q = splitter.next(p, end);
      add(p, q - p, 1);
    }
  }
};

// The texts dealt out to `threads` of about equal size; a text is only cut where every style surely splits.
inline std::vector<std::vector<std::string_view>> deal(const std::vector<std::string_view>& texts, size_t threads) {
  size_t total = 0, dealt = 0;
  for (const auto& text : texts) total += text.size();
  std::vector<std::vector<std::string_view>> shares(threads);
  size_t share = 0;
  for (std::string_view text : texts) {
    while (!text.empty()) {
      const size_t goal = total * (share + 1) / threads;
      const char *begin = text.data(), *end = begin + text.size(), *cut = end;
      if (share + 1 < threads && dealt + text.size() > goal) {
        cut = Splitter::sure_cut(begin + (goal - dealt), begin, end);
      }
      shares[share].emplace_back(begin, cut - begin);
      dealt += cut - begin;
      text.remove_prefix(cut - begin);
      while (share + 1 < threads && dealt >= total * (share + 1) / threads) ++share;
    }
  }
  return shares;
}

class Counter {
 public:
  void count(const Splitter& splitter, const std::vector<std::string_view>& texts, size_t threads) {
    if (parts_.size() < threads) parts_.resize(threads);
    const auto shares = deal(texts, threads);
    const auto work = [&](size_t t) {
      for (const auto& text : shares[t]) parts_[t].split(splitter, text);
    };
    std::vector<std::thread> others;
    for (size_t t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (auto& thread : others) thread.join();
  }

  void count(std::string_view piece) {
    if (parts_.empty()) parts_.resize(1);
    parts_[0].add(piece.data(), piece.size(), 1);
  }

  const WordCounts& total() {
    if (parts_.empty()) parts_.resize(1);
    for (size_t t = 1; t < parts_.size(); ++t) {
      for (uint32_t i = 0; i < parts_[t].words.size(); ++i) {
        parts_[0].add(parts_[t].words[i].data(), parts_[t].words[i].size(), parts_[t].counts[i]);
      }
    }
    parts_.resize(1);
    return parts_[0];
  }

 private:
  std::vector<WordCounts> parts_;  // one for each thread
};

class Trainer {
 public:
  // `order[b]` is the symbol of byte b.
  Trainer(const WordCounts& counted, const uint8_t* order) : counts_(counted.counts) {
    for (uint32_t w = 0; w < counts_.size(); ++w) {
      starts_.push_back(symbols_.size());
      for (const char byte : counted.words[w]) symbols_.push_back(order[static_cast<uint8_t>(byte)]);
      lengths_.push_back(static_cast<uint32_t>(symbols_.size() - starts_[w]));
      const uint32_t* s = symbols_.data() + starts_[w];
      for (uint32_t i = 0; i + 1 < lengths_[w]; ++i) change(s[i], s[i + 1], w, 1);
    }
    changed_.clear();
    for (uint32_t i = 0; i < pairs_.size(); ++i) queue_.push({pairs_[i].count, pairs_[i].left, pairs_[i].right, i});
  }

  // At most `wanted` (left, right) pairs, the most frequent first; fewer when no pair is left.
  std::vector<std::pair<uint32_t, uint32_t>> merges(size_t wanted) {
    std::vector<std::pair<uint32_t, uint32_t>> done;
    while (done.size() < wanted && !queue_.empty()) {
      Candidate best = queue_.top();
      queue_.pop();
      if (best.count != pairs_[best.index].count) {  // out of date: back with the count of today
        best.count = pairs_[best.index].count;
        if (best.count > 0) queue_.push(best);
        continue;
      }
      done.emplace_back(best.left, best.right);
      const auto product = static_cast<uint32_t>(255 + done.size());
      const std::vector<uint32_t> words = std::move(pairs_[best.index].words);
      for (const uint32_t w : words) merge(w, best.left, best.right, product);
      pairs_[best.index].count = 0;
      for (const uint32_t i : changed_) {
        if (pairs_[i].count > 0) queue_.push({pairs_[i].count, pairs_[i].left, pairs_[i].right, i});
      }
      changed_.clear();
    }
    return done;
  }

 private:
  struct Pair {
    uint32_t left, right;
    int64_t count;
    std::vector<uint32_t> words;  // every word that holds it, once, and some that no longer do
  };
  struct Candidate {
    int64_t count;
    uint32_t left, right, index;
    bool operator<(const Candidate& other) const {  // the greatest has the highest count, then the smallest symbols
      if (count != other.count) return count < other.count;
      return std::pair(left, right) > std::pair(other.left, other.right);
    }
  };

  void change(uint32_t left, uint32_t right, uint32_t word, int sign) {
    const uint32_t index = index_.find_or_insert(left, right, static_cast<uint32_t>(pairs_.size()));
    if (index == pairs_.size()) {
      pairs_.push_back({left, right, 0, {}});
      changed_.push_back(index);
    }
    Pair& pair = pairs_[index];
    pair.count += sign * counts_[word];
    if (sign > 0 && (pair.words.empty() || pair.words.back() != word)) pair.words.push_back(word);
  }

  void merge(uint32_t word, uint32_t left, uint32_t right, uint32_t product) {
    uint32_t* s = symbols_.data() + starts_[word];
    const uint32_t n = lengths_[word];
    uint32_t out = 0;
    for (uint32_t i = 0; i < n; ++out) {
      if (!(s[i] == left && i + 1 < n && s[i + 1] == right)) {
        s[out] = s[i++];
        continue;
      }
      if (out > 0) {
        change(s[out - 1], left, word, -1);
        change(s[out - 1], product, word, 1);
      }
      if (i + 2 < n) {
        change(right, s[i + 2], word, -1);
        change(product, s[i + 2], word, 1);
      }
      s[out] = product;
      i += 2;
    }
    lengths_[word] = out;
  }

  std::vector<int64_t> counts_;
  std::vector<uint32_t> symbols_, lengths_;
  std::vector<size_t> starts_;
  PairMap<uint32_t> index_;
  std::vector<Pair> pairs_;
  std::vector<uint32_t> changed_;  // pairs that are new in this merge: only those can have grown
  std::priority_queue<Candidate> queue_;
};

}  // namespace bpe
