// Posteriors over the inverted lists of a patch index, by Horvitz-Thompson sampling.
//
// A query reads random blocks of kRows codes of a list with inclusion probability 2^-j, where j
// grows with the distance of the list's centroid, and divides their sums by it. So sums over all
// codes are estimated without bias, and the spread of the blocks gives the error. Lists are the
// outer loop: a block of codes serves all queries that read it, and distances are products of small
// matrices. A group of kLanes queries reads what the nearest of them does.
//
// Lanes are queries. All exponents are to base 2: that of a code z for a query y is
// precision * (2 y.z - |z|^2), the logit less what depends on the query alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "simd.h"
#include "tiles.h"

namespace els {

constexpr int kRows = 16;  // codes of a block
constexpr int kIdBytes = sizeof(std::int64_t);
constexpr int kMostChannels = 4;
constexpr int kMostLevels = 16;           // of inclusion probabilities
constexpr float kLargestRank = 65534.0f;  // one less than 16 bits hold, so that a limit is above it

struct ListSample {
  // One list after the other, codes uint8 [size, code_size] and then their ids int64 [size].
  std::int64_t lists;
  const std::uint8_t* data;
  const std::int64_t* sizes;
  const std::int64_t* offsets;  // how many codes are in the lists before
  int code_size;
  const float* centroids;       // [lists, code_size]
  const float* norms;           // [count], of |z|^2
  const std::uint8_t* centres;  // [count, C]
  int channels;
  // Component d of a code's z is unit[d] * byte + zero[d], plus the centroid's if `residual`.
  const float* unit;
  const float* zero;
  bool residual;
  // Which of so many images are candidates, by id / pixels; null for all.
  const std::uint8_t* allowed;
  std::int64_t images;
  std::int64_t pixels;
  // Queries float32 [Q, code_size].
  const float* y;
  int queries;
  const double* budget;    // codes that a query may read, [Q]
  double precision;        // log2(e) alpha^2 / (2 sigma^2), in units of a code's component
  double blur;             // the same, widened by the spread of a list around its centroid
  std::int64_t most_read;  // of one list
  int coarsest;            // the largest j
  std::uint64_t seed;
  // Of each list, the variance of a weight over its square, where codes are not whole patches;
  // null where they are.
  const float* noise;
  bool tiles;  // whether to use the matrix unit
  // Fixed by the input alone, so that results do not depend on the number of threads.
  int parts;
  double* results;  // [parts, fields, Q]

  int fields() const { return 5 + 3 * channels; }
  const std::uint8_t* codes_of(std::int64_t list) const {
    return data + offsets[list] * (code_size + kIdBytes);
  }
};

namespace detail {

inline std::uint64_t mixed(std::uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace detail

// What all threads share: the queries in lanes, and each one's inclusion probability of each list.
class ListPlan {
 public:
  explicit ListPlan(const ListSample& sample)
      : sample(sample),
        groups((sample.queries + kLanes - 1) / kLanes),
        padded(groups * kLanes),
        ranks(new std::uint16_t[static_cast<std::size_t>(sample.lists) * padded]),
        nearest(padded, 0xffff),
        base(padded, 0),
        limits(padded, 0) {
    for (std::int64_t list = 0; list < sample.lists; ++list) {
      most_ += std::min(sample.sizes[list], sample.most_read);
    }
    const int size = sample.code_size;
    lanes_.resize(static_cast<std::size_t>(padded) * size);
    powers_.resize(groups);
    for (int p = 0; p < sample.queries; ++p) {
      float power = 0.0f;
      for (int d = 0; d < size; ++d) {
        const float value = sample.y[static_cast<std::size_t>(p) * size + d];
        lanes_[(static_cast<std::size_t>(p / kLanes) * size + d) * kLanes + p % kLanes] = value;
        power += value * value;
      }
      powers_[p / kLanes][p % kLanes] = power;
    }
    width_ = (size + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
    rounded_.resize(static_cast<std::size_t>(padded) * width_);
    steps.resize(padded);
    for (int p = 0; p < sample.queries; ++p) {
      const float* const y = sample.y + static_cast<std::size_t>(p) * size;
      float largest = 1e-30f;
      for (int d = 0; d < size; ++d) largest = std::max(largest, std::abs(y[d] * sample.unit[d]));
      steps[p] = largest / kLargestQuery;
      for (int d = 0; d < size; ++d) {
        rounded_[static_cast<std::size_t>(p) * width_ + d] =
            static_cast<std::int16_t>(std::lrint(y[d] * sample.unit[d] / steps[p]));
      }
    }
  }

  // A query's components, times the codes' units, in units of its step; zeros up to whole vectors.
  const std::int16_t* rounded(int query) const {
    return rounded_.data() + static_cast<std::size_t>(query) * width_;
  }

  // Ranks lists first..last: distances in quarters of a power of two of the weight. In any order.
  void rank(std::int64_t first, std::int64_t last) {
    constexpr int kLists = 4, kGroups = 2;  // computed together, from the same loads
    const int size = sample.code_size;
    const Vec scale = splat(static_cast<float>(4.0 * sample.blur));
    std::vector<float> powers(last - first);
    for (std::int64_t list = first; list < last; ++list) {
      const float* const centroid = sample.centroids + list * size;
      powers[list - first] = std::inner_product(centroid, centroid + size, centroid, 0.0f);
    }
    std::vector<std::uint16_t> least(padded);
    for (int group = 0; group < groups; group += kGroups) {
      const int second = std::min(group + 1, groups - 1);
      const float* const lanes[kGroups] = {lanes_of(group), lanes_of(second)};
      ShortVec nearer[kGroups];
      std::memset(nearer, 0xff, sizeof(nearer));
      for (std::int64_t list = first; list < last; list += kLists) {
        const float* centroids[kLists];
        for (int i = 0; i < kLists; ++i) {
          centroids[i] = sample.centroids + std::min(list + i, last - 1) * size;
        }
        Vec products[kGroups][kLists] = {};
        for (int d = 0; d < size; ++d) {
          const Vec queries[kGroups] = {load(lanes[0] + d * kLanes), load(lanes[1] + d * kLanes)};
          for (int i = 0; i < kLists; ++i) {
            const Vec centroid = splat(centroids[i][d]);
            for (int g = 0; g < kGroups; ++g) products[g][i] += queries[g] * centroid;
          }
        }
        for (int g = 0; g < kGroups; ++g) {
          const int at = g == 0 ? group : second;
          for (int i = 0; i < kLists && list + i < last; ++i) {
            const Vec distance = powers_[at] + powers[list + i - first] - 2.0f * products[g][i];
            const Vec rank = min(max(scale * distance, Vec{}), splat(kLargestRank));
            const ShortVec rounded =
                __builtin_convertvector(__builtin_convertvector(rank, IntVec), ShortVec);
            std::memcpy(ranks.get() + (list + i) * padded + at * kLanes, &rounded, sizeof(rounded));
            if (sample.sizes[list + i] == 0) continue;
            nearer[g] = rounded < nearer[g] ? rounded : nearer[g];
          }
        }
      }
      std::memcpy(least.data() + second * kLanes, &nearer[1], sizeof(nearer[1]));
      std::memcpy(least.data() + group * kLanes, &nearer[0], sizeof(nearer[0]));
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int p = 0; p < padded; ++p) nearest[p] = std::min(nearest[p], least[p]);
  }

  // Finds from which rank on queries first..last read less than everything, within the budget.
  void spend(int first, int last) {
    constexpr int kBins = 256, kAhead = 16;
    const int count = last - first;
    const std::uint16_t* const __restrict least = nearest.data() + first;
    std::vector<float> bins(static_cast<std::size_t>(count) * kBins);
    // The number of codes read is estimated from some thousand lists.
    const std::int64_t stride = std::max<std::int64_t>(1, sample.lists / 4096);
    float total = 0.0f;
    for (std::int64_t list = 0; list < sample.lists; list += stride) {
      const float size =
          static_cast<float>(stride * std::min(sample.sizes[list], sample.most_read));
      if (size == 0.0f) continue;
      const std::uint16_t* const row = ranks.get() + list * padded + first;
      if (list + kAhead * stride < sample.lists) __builtin_prefetch(row + kAhead * stride * padded);
      total += size;
      for (int start = 0; start < count; start += kLanes) {
        const ShortVec further = load_shorts(row + start) - load_shorts(least + start);
        if (!any(further < static_cast<std::uint16_t>(kBins - 1))) continue;  // few are
        for (int i = start; i < std::min(start + kLanes, count); ++i) {
          const int bin = row[i] - least[i];
          if (bin < kBins - 1) bins[i * kBins + bin] += size;
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      float* const of = bins.data() + i * kBins;
      of[kBins - 1] = std::max(total - std::accumulate(of, of + kBins - 1, 0.0f), 0.0f);
    }
    double parts[kMostLevels];
    for (int level = 0; level < kMostLevels; ++level) parts[level] = std::ldexp(1.0, -level);
    for (int i = 0; i < count; ++i) {
      const auto reads = [&](int from) {
        double codes = 0.0;
        for (int bin = 0; bin < kBins; ++bin) {
          const int level = std::min(std::max((bin - from + 3) >> 2, 0), sample.coarsest);
          codes += parts[level] * static_cast<double>(bins[i * kBins + bin]);
        }
        return codes;
      };
      const double budget = sample.budget[first + i];
      int low = -4 * sample.coarsest, high = kBins;  // reads(low) is the least there is
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (reads(middle) <= budget ? low : high) = middle;
      }
      // With a budget of all codes, all are read.
      base[first + i] = least[i] + (static_cast<double>(most_) <= budget ? 0x10000 : low);
      const int limit = base[first + i] + 4 * sample.coarsest - 3;
      limits[first + i] = static_cast<std::uint16_t>(std::min(std::max(limit, 0), 0xffff));
    }
  }

  const ListSample& sample;
  const int groups, padded;
  // [lists, padded], all of which are written before they are read.
  const std::unique_ptr<std::uint16_t[]> ranks;
  std::vector<std::uint16_t> nearest;  // [padded]
  std::vector<std::int32_t> base;      // [padded]: the rank up to which a query reads everything
  std::vector<std::uint16_t> limits;   // [padded]: and from which on the coarsest level
  std::vector<float> steps;            // [padded]: see rounded()

 private:
  const float* lanes_of(int group) const {
    return lanes_.data() + static_cast<std::size_t>(group) * sample.code_size * kLanes;
  }

  std::vector<float> lanes_;           // [groups, code_size, lane]
  Buffer<Vec> powers_;                 // [groups]
  std::vector<std::int16_t> rounded_;  // [padded, width]
  int width_ = 0;                      // of a rounded query, code_size or more
  std::mutex mutex_;
  std::int64_t most_ = 0;  // codes that a query can read
};

// Products of a block of codes with the queries of a group, in 16-bit integers.
class IntegerProducts {
 public:
  explicit IntegerProducts(const ListPlan& plan)
      : plan_(plan), size_(plan.sample.code_size), words_((size_ + 1) / 2) {
    lanes_.resize(static_cast<std::size_t>(words_ + kLanes - 1) * kLanes);
    block_.resize(static_cast<std::size_t>(kRows) * 2 * words_ + kLanes);
  }

  void choose(const std::int32_t* members) {
    for (int lane = 0; lane < kLanes; ++lane) steps_[lane] = plan_.steps[members[lane]];
    for (int word = 0; word < words_; word += kLanes) {
      Vec rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        std::memcpy(&rows[lane], plan_.rounded(members[lane]) + 2 * word, sizeof(rows[lane]));
      }
      transpose(rows);
      std::memcpy(lanes_.data() + word * kLanes, rows, sizeof(rows));
    }
  }

  // `codes` has kRows of them, and kLanes bytes more that may be read.
  void multiply(const std::uint8_t* codes, Vec (&products)[kRows]) {
    constexpr int kTogether = 4, kWords = kSummedProducts / 2;
    // Codes of an even size are widened as one; of others with what lies behind them, which meets
    // a query's zero or is overwritten by the next.
    const int parts = size_ % 2 == 0 ? 1 : kRows, length = kRows / parts * size_;
    for (int part = 0; part < parts; ++part) {
      for (int i = 0; i < length; i += kLanes) {
        ByteVec from;
        std::memcpy(&from, codes + part * size_ + i, sizeof(from));
        const ShortVec to = __builtin_convertvector(from, ShortVec);
        std::memcpy(block_.data() + part * 2 * words_ + i, &to, sizeof(to));
      }
    }
    const std::size_t row_bytes = sizeof(std::int32_t) * words_;
    const char* block = reinterpret_cast<const char*>(block_.data());
    for (int row = 0; row < kRows; row += kTogether, block += kTogether * row_bytes) {
      Vec totals[kTogether] = {};
      for (int first = 0; first < words_; first += kWords) {
        const int last = std::min(first + kWords, words_);
        IntVec sums[kTogether] = {};
        for (int word = first; word < last; ++word) {
          PairVec query;
          std::memcpy(&query, lanes_.data() + word * kLanes, sizeof(query));
          for (int i = 0; i < kTogether; ++i) {
            std::int32_t code;
            std::memcpy(&code, block + i * row_bytes + sizeof(code) * word, sizeof(code));
            sums[i] = add_products(sums[i], query, reinterpret_cast<PairVec>(code - IntVec{}));
          }
        }
        for (int i = 0; i < kTogether; ++i) totals[i] += __builtin_convertvector(sums[i], Vec);
      }
      for (int i = 0; i < kTogether; ++i) products[row + i] = totals[i] * steps_;
    }
  }

 private:
  const ListPlan& plan_;
  const int size_, words_;      // of a code: bytes, and pairs of them
  Buffer<std::int32_t> lanes_;  // of the chosen, pairs of 16 bits: [word, lane]
  Buffer<std::int16_t> block_;  // of codes: [row, 2 * words]
  Vec steps_ = {};
};

#if defined(ELS_HAS_TILES)
// The same on the matrix unit, of high and low bytes.
class TileProducts {
 public:
  explicit TileProducts(const ListPlan& plan)
      : plan_(plan),
        sample_(plan.sample),
        words_((sample_.code_size + 3) / 4),
        tiles_((words_ + kRows - 1) / kRows) {
    const std::size_t row = static_cast<std::size_t>(tiles_) * kTileBytes;
    high_.resize(plan.padded * row);
    low_.resize(plan.padded * row);
    for (int p = 0; p < sample_.queries; ++p) {
      for (int d = 0; d < sample_.code_size; ++d) {
        const Digits digits = digits_of(plan.rounded(p)[d]);
        low_[p * row + d] = digits.low;
        high_[p * row + d] = digits.high;
      }
    }
    chosen_.resize(static_cast<std::size_t>(tiles_) * 2 * kRows * kTileBytes);
    block_.resize(static_cast<std::size_t>(kRows) * words_ * 4);
    TileShapes shapes;
    const int last = words_ - (tiles_ - 1) * kRows;
    // 0, 1: sums of high and low; 2, 3, 4: whole tiles of codes, high and low; 5, 6, 7: the last.
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_codes = tile == 2 || tile == 5, is_last = tile >= 5;
      shapes.row_bytes[tile] =
          static_cast<std::uint16_t>(is_codes && is_last ? 4 * last : kTileBytes);
      shapes.rows[tile] = static_cast<std::uint8_t>(!is_codes && is_last ? last : kRows);
    }
    load_shapes(shapes);
  }

  TileProducts(const TileProducts&) = delete;
  TileProducts& operator=(const TileProducts&) = delete;
  ~TileProducts() { release_tiles(); }

  void choose(const std::int32_t* members) {
    for (int tile = 0; tile < tiles_; ++tile) {
      std::uint8_t* const out = chosen_.data() + tile * 2 * kRows * kTileBytes;
      choose(members, high_.data() + tile * kTileBytes, out);
      choose(members, low_.data() + tile * kTileBytes, out + kRows * kTileBytes);
    }
    for (int lane = 0; lane < kLanes; ++lane) steps_[lane] = plan_.steps[members[lane]];
    // Queries that fit stay in their tiles for all blocks.
    const std::uint8_t* const last = chosen_.data() + (tiles_ - 1) * 2 * kRows * kTileBytes;
    load_tile<6>(last, kTileBytes);
    load_tile<7>(last + kRows * kTileBytes, kTileBytes);
    if (tiles_ == 2) {
      load_tile<3>(chosen_.data(), kTileBytes);
      load_tile<4>(chosen_.data() + kRows * kTileBytes, kTileBytes);
    }
  }

  void multiply(const std::uint8_t* codes, Vec (&products)[kRows]) {
    long stride = sample_.code_size;
    if (sample_.code_size % 4 != 0) {
      // In whole words, of which the last has bytes of the next code where there is one: the query
      // is zero there.
      const long width = 4 * words_, end = kRows * stride;
      for (int row = 0; row < kRows; ++row) {
        const std::uint8_t* const from = codes + row * stride;
        std::uint8_t* const to = block_.data() + row * width;
        if (row * stride + width > end) {
          std::memcpy(to, from, stride);
          continue;
        }
        for (int at = 0; at < width; at += 4) std::memcpy(to + at, from + at, 4);
      }
      codes = block_.data();
      stride = 4 * words_;
    }
    clear_tile<0>();
    clear_tile<1>();
    for (int tile = 0; tile + 1 < tiles_; ++tile) {
      if (tiles_ > 2) {
        const std::uint8_t* const queries = chosen_.data() + tile * 2 * kRows * kTileBytes;
        load_tile<3>(queries, kTileBytes);
        load_tile<4>(queries + kRows * kTileBytes, kTileBytes);
      }
      load_tile<2>(codes + tile * kTileBytes, stride);
      multiply_tiles<0, 2, 3>();
      multiply_tiles<1, 2, 4>();
    }
    load_tile<5>(codes + (tiles_ - 1) * kTileBytes, stride);
    multiply_tiles<0, 5, 6>();
    multiply_tiles<1, 5, 7>();
    store_tile<0>(sums_, kTileBytes);
    store_tile<1>(sums_ + kRows * kLanes, kTileBytes);
    const __m512 step = reinterpret_cast<__m512>(steps_);
    const __m512 big = _mm512_mul_ps(step, _mm512_set1_ps(256.0f));
    for (int row = 0; row < kRows; ++row) {
      const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(sums_ + row * kLanes));
      const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(sums_ + (kRows + row) * kLanes));
      products[row] = reinterpret_cast<Vec>(_mm512_fmadd_ps(high, big, _mm512_mul_ps(low, step)));
    }
  }

 private:
  // Lanes are the columns of a tile, 4 bytes wide.
  void choose(const std::int32_t* members, const std::int8_t* digits, std::uint8_t* out) const {
    Vec rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(&rows[lane],
                  digits + static_cast<std::size_t>(members[lane]) * tiles_ * kTileBytes,
                  sizeof(Vec));
    }
    transpose(rows);
    std::memcpy(out, rows, sizeof(rows));
  }

  const ListPlan& plan_;
  const ListSample& sample_;
  const int words_, tiles_;         // of a code: 4 bytes, and up to 64 bytes
  Buffer<std::int8_t> high_, low_;  // [padded, tiles * 64]
  Vec steps_ = {};
  Buffer<std::uint8_t> chosen_;  // [tile][high, low][word][lane * 4]
  Buffer<std::uint8_t> block_;
  alignas(64) std::int32_t sums_[2 * kRows * kLanes];
};
#endif

// One thread's work: parts of the lists, one after another.
template <int C, bool kNoisy, typename Products>
class ListReader {
 public:
  explicit ListReader(ListPlan& plan) : plan_(plan), sample_(plan.sample), products_(plan) {
    sums_.resize(static_cast<std::size_t>(plan.padded) * kWidth);
    origin_.resize(sample_.code_size);
    level_.resize(plan.padded);
    found_.resize(plan.padded + kLanes);
    sorted_.resize(plan.padded + kLanes);
    padded_block_.resize(static_cast<std::size_t>(kRows) * sample_.code_size + kLanes);
    for (int level = 0; level <= kDeepest; ++level) part_of_[level] = std::ldexp(1.0f, -level);
    threshold_ =
        static_cast<float>(22.0 + std::log2(static_cast<double>(sample_.offsets[sample_.lists - 1] +
                                                                sample_.sizes[sample_.lists - 1]) +
                                            1.0));
  }

  void run(int part, std::int64_t first, std::int64_t last, const std::atomic<bool>& cancelled) {
    std::fill_n(sums_.data(), static_cast<std::size_t>(plan_.padded) * kWidth, 0.0f);
    for (int p = 0; p < plan_.padded; ++p) sums_[p * kWidth + kReference] = kNothing;
    for (std::int64_t list = first; list < last; ++list) {
      if (cancelled.load(std::memory_order_relaxed)) return;
      if (sample_.sizes[list] > 0) read(list);
    }
    double* out = sample_.results + static_cast<std::size_t>(part) * kFields * sample_.queries;
    for (int field = 0; field < kFields; ++field, out += sample_.queries) {
      for (int p = 0; p < sample_.queries; ++p) out[p] = sums_[p * kWidth + field];
    }
  }

 private:
  // Of every query: reference exponent, then sums relative to it: mass, the part of it that was
  // read, logit_sum, centres; and for the variance of a mean, of blocks, squares of mass, mass
  // times centre, and squares of centre, less what evenly spread blocks of a list have in common.
  static constexpr int kReference = 0, kMass = 1, kSeen = 2, kLogitSum = 3, kCentre = 4,
                       kSquares = 4 + C, kFields = kSquares + 1 + 2 * C;
  // Of a row of sums: whole vectors.
  static constexpr int kWidth = (kFields + kLanes - 1) / kLanes * kLanes;

  static constexpr int kDeepest = 32;  // level: of a list that is larger than any

  struct Block {
    std::int64_t number;
    int level;  // the coarsest that reads it
  };

  void read(std::int64_t list) {
    list_ = list;
    const std::int64_t size = sample_.sizes[list];
    int finest = 0;
    while ((size >> finest) > sample_.most_read) ++finest;
    const int coarsest = std::max(finest, sample_.coarsest);
    sort(finest, coarsest);
    choose_blocks(size, many_ > 0 ? level_[sorted_[0]] : coarsest);
    if (blocks_.empty()) return;
    expect(&blocks_[0]);
    fetch(lines_);
    if (kNoisy || sample_.residual) {
      const float* const centroid = sample_.centroids + list * sample_.code_size;
      for (int d = 0; d < sample_.code_size; ++d) {
        origin_[d] = sample_.zero[d] + (sample_.residual ? centroid[d] : 0.0f);
      }
    }
    for (int at = 0; at < many_; at += kLanes) {
      const int count = std::min(kLanes, many_ - at);
      for (int lane = count; lane < kLanes; ++lane) sorted_[at + lane] = sorted_[at];
      take(sorted_.data() + at, count);
      // A block that one query of the group reads is weighed for all of them at no further cost.
      const int least = level_[sorted_[at]];
      std::fill_n(levels_, count, least);
      const Block* next = blocks_.data();
      const Block* const end = next + blocks_.size();
      const auto find = [&] {
        while (next != end && next->level < least) ++next;
      };
      find();
      if (next == end) continue;
      open();
      while (next != end) {
        const Block& block = *next++;
        find();
        expect(next != end ? next : nullptr);
        weigh(block);
      }
      close();
    }
    // Queries for which the list is of the coarsest level, in the order in which they are.
    bool any = false;
    for (const Block& block : blocks_) any = any || block.level >= coarsest;
    if (!any || many_ == sample_.queries) return;
    for (int group = 0; group < plan_.groups; ++group) {
      std::int32_t members[kLanes];
      bool serves = false;
      for (int lane = 0; lane < kLanes; ++lane) {
        members[lane] = group * kLanes + lane;
        serves = serves || (members[lane] < sample_.queries && level_[members[lane]] == coarsest);
      }
      if (!serves) continue;
      take(members, std::min(kLanes, sample_.queries - group * kLanes));
      for (int lane = 0; lane < kLanes; ++lane) {
        if (level_[members[lane]] != coarsest) levels_[lane] = kMostLevels * 4;
      }
      open();
      expect(nullptr);
      for (const Block& block : blocks_) {
        if (block.level >= coarsest) weigh(block);
      }
      close();
    }
  }

  // Queries that read more than the coarsest level does, those that read most first.
  void sort(int finest, int coarsest) {
    const std::uint16_t* const __restrict ranks =
        plan_.ranks.get() + static_cast<std::size_t>(list_) * plan_.padded;
    const std::uint16_t* const __restrict limits = plan_.limits.data();
    const std::int32_t* const __restrict base = plan_.base.data();
    std::uint8_t* const __restrict level = level_.data();
    const int padded = plan_.padded, queries = sample_.queries;
    std::int32_t* const __restrict found = found_.data();
    std::fill_n(level, padded, static_cast<std::uint8_t>(coarsest));
    many_ = 0;
    // Where nothing is left out, the order is that of the queries.
    if (coarsest == finest) return;
    int many = 0;
    for (int start = 0; start < padded; start += kLanes) {
      const ShortVec rank = load_shorts(ranks + start);
      if (!any(rank < load_shorts(limits + start))) continue;
      IntVec from;
      std::memcpy(&from, base + start, sizeof(from));
      IntVec steps = (__builtin_convertvector(rank, IntVec) - from + 3) >> 2;
      steps = steps < finest ? finest - IntVec{} : steps;
      steps = steps > coarsest ? coarsest - IntVec{} : steps;
      const ByteVec levels = __builtin_convertvector(steps, ByteVec);
      std::memcpy(level + start, &levels, sizeof(levels));
      for (int p = start; p < std::min(start + kLanes, queries); ++p) {  // without a branch
        found[many] = p;
        many += level[p] < coarsest;
      }
    }
    many_ = many;
    if (many_ == 0) return;
    int counts[kMostLevels * 4] = {};
    for (int i = 0; i < many_; ++i) ++counts[level[found_[i]]];
    for (int j = 0, at = 0; j < coarsest; ++j) {
      const int count = counts[j];
      counts[j] = at;
      at += count;
    }
    for (int i = 0; i < many_; ++i) sorted_[counts[level[found_[i]]]++] = found_[i];
  }

  // Blocks that anyone reads, at the least level that there is. Level j reads those whose number
  // has j leading zeros: 2^-j of them, evenly spread over the list, those of level j + 1 among
  // them.
  void choose_blocks(std::int64_t size, int least) {
    blocks_.clear();
    const std::uint32_t start =
        static_cast<std::uint32_t>(detail::mixed(sample_.seed ^ detail::mixed(list_)) >> 32);
    for (std::int64_t number = 0; number * kRows < size; ++number) {
      const std::uint32_t place = start + static_cast<std::uint32_t>(number) * 2654435769u;
      const int level = place == 0 ? kDeepest : __builtin_clz(place);
      if (level >= least) blocks_.push_back({number, level});
    }
  }

  void take(const std::int32_t* members, int count) {
    std::copy_n(members, kLanes, members_);
    count_ = count;
    for (int lane = 0; lane < kLanes; ++lane) {
      levels_[lane] = lane < count ? level_[members[lane]] : kMostLevels * 4;
    }
  }

  // Loads the sums of the current queries.
  void open() {
    products_.choose(members_);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int level = std::min(levels_[lane], kDeepest);
      shift_[lane] = static_cast<float>(level);
      // The variance of sampling the blocks; 0 where all are read.
      varies_[lane] = 1.0f - part_of_[level];
    }
    parts_ = splat(1.0f) - varies_;
    base_ = shift_;
    if (kNoisy || sample_.residual) {
      const float precision = static_cast<float>(2.0 * sample_.precision);
      base_ += precision * products_with_origin();
    }
    for (int field = 0; field < kWidth; field += kLanes) {
      Vec rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) rows[lane] = load(row_of(lane) + field);
      transpose(rows);
      std::copy_n(rows, kLanes, state_ + field);
    }
    weighed_ = 0;
    begun_[0] = state_[kMass];
    std::copy_n(state_ + kCentre, C, begun_ + 1);
  }

  float* row_of(int lane) {
    return sums_.data() + static_cast<std::size_t>(members_[lane]) * kWidth;
  }

  // Products of the current queries with the point that the bytes of this list are relative to.
  Vec products_with_origin() const {
    const int whole = sample_.code_size / kLanes * kLanes;
    Vec sums[kLanes], rest = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      const int query = std::min(members_[lane], sample_.queries - 1);
      const float* const y = sample_.y + static_cast<std::size_t>(query) * sample_.code_size;
      sums[lane] = Vec{};
      for (int d = 0; d < whole; d += kLanes) sums[lane] += load(y + d) * load(origin_.data() + d);
      for (int d = whole; d < sample_.code_size; ++d) rest[lane] += y[d] * origin_[d];
    }
    transpose(sums);
    // In pairs, to hide the latency of the loads.
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0] + rest;
  }

  void close() {
    // Blocks are evenly spread over the list: how many are read, n, is nearly certain, and what
    // they have in common errs as one of them. Of their sum D that is D^2 / n^2, not D^2 / n.
    const float n = static_cast<float>(weighed_);
    const Vec shared = splat((n - 1.0f) / (n * n)) * varies_;
    const Vec mass = state_[kMass] - begun_[0];
    state_[kSquares] -= shared * mass * mass;
    for (int c = 0; c < C; ++c) {
      const Vec centre = state_[kCentre + c] - begun_[1 + c];
      state_[kSquares + 1 + c] -= shared * mass * centre;
      state_[kSquares + 1 + C + c] -= shared * centre * centre;
    }
    for (int field = 0; field < kWidth; field += kLanes) {
      Vec rows[kLanes];
      std::copy_n(state_ + field, kLanes, rows);
      transpose(rows);
      for (int lane = 0; lane < count_; ++lane) store(rows[lane], row_of(lane) + field);
    }
  }

  // The next block's address follows no pattern that a processor predicts, so it is prefetched, one
  // cache line after another while this block is weighed.
  void expect(const Block* block) {
    lines_ = 0;
    if (block == nullptr) return;
    const std::int64_t begin = block->number * kRows, place = sample_.offsets[list_] + begin;
    ahead_ = sample_.codes_of(list_) + begin * sample_.code_size;
    lines_ = (kRows * sample_.code_size + 63) / 64;
    __builtin_prefetch(sample_.norms + place);
    __builtin_prefetch(sample_.centres + place * C);
  }

  void fetch(int lines) {
    for (lines = std::min(lines, lines_); lines > 0; --lines, --lines_, ahead_ += 64) {
      __builtin_prefetch(ahead_);
    }
  }

  void weigh(const Block& block) {
    ++weighed_;
    const std::int64_t size = sample_.sizes[list_], begin = block.number * kRows;
    const int rows = static_cast<int>(std::min<std::int64_t>(kRows, size - begin));
    const std::uint8_t* codes = sample_.codes_of(list_) + begin * sample_.code_size;
    if (rows < kRows) {  // beyond the last code memory may end; behind a whole block are ids
      std::memcpy(padded_block_.data(), codes, static_cast<std::size_t>(rows) * sample_.code_size);
      codes = padded_block_.data();
    }
    Vec exponents[kRows];
    products_.multiply(codes, exponents);
    const float scale = static_cast<float>(2.0 * sample_.precision);
    const float minus = static_cast<float>(-sample_.precision);
    const std::int64_t place = sample_.offsets[list_] + begin;
    Vec base = base_;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (levels_[lane] > block.level) base[lane] = kNever;
    }
    Vec most = splat(kNever);
    const int lines = (lines_ + 31) / 32;
    for (int row = 0; row < kRows; ++row) {
      fetch(lines);
      const bool counts = row < rows && is_allowed(begin + row);
      const float norm = counts ? minus * sample_.norms[place + row] : kNever;
      exponents[row] = exponents[row] * scale + (base + norm);
      most = max(most, exponents[row]);
    }
    Vec& reference = state_[kReference];
    if (mask_less(reference - threshold_, most) == 0) {
      fetch(lines_);
      return;
    }
    if (mask_less(reference + 8.0f, most) != 0) lower(max(reference, most));
    Vec mass = {}, logit_sum = {}, centre[C] = {}, single[1 + 2 * C] = {};
    std::uint8_t bytes[kRows * C] = {};
    std::memcpy(bytes, sample_.centres + place * C, static_cast<std::size_t>(rows) * C);
    float levels[kRows * C];
    for (int i = 0; i < kRows * C; i += kLanes) {
      const Vec converted = bytes_to_floats(bytes + i);
      std::memcpy(levels + i, &converted, sizeof(converted));
    }
    for (int row = 0; row < rows; row += 4) {
      Vec below[4], weight[4];
      fetch(4 * lines);
      for (int i = 0; i < 4; ++i) below[i] = exponents[row + i] - reference;
      exp2_nonpositive(below, weight);
      for (int i = 0; i < 4 && row + i < rows; ++i) {
        mass += weight[i];
        logit_sum += weight[i] * below[i];
        const Vec square = weight[i] * weight[i];
        if (kNoisy) single[0] += square;
        for (int c = 0; c < C; ++c) {
          const float level = levels[(row + i) * C + c];
          centre[c] += weight[i] * level;
          if (kNoisy) {
            single[1 + c] += square * level;
            single[1 + C + c] += square * (level * level);
          }
        }
      }
    }
    state_[kMass] += mass;
    state_[kSeen] += parts_ * mass;
    // The entropy is that of the weights, without the inclusion probabilities.
    state_[kLogitSum] += logit_sum - shift_ * mass;
    const Vec varying = varies_ * mass;
    state_[kSquares] += varying * mass;
    for (int c = 0; c < C; ++c) {
      state_[kCentre + c] += centre[c];
      state_[kSquares + 1 + c] += varying * centre[c];
      state_[kSquares + 1 + C + c] += varies_ * centre[c] * centre[c];
    }
    if (kNoisy) {
      for (int i = 0; i < 1 + 2 * C; ++i) state_[kSquares + i] += sample_.noise[list_] * single[i];
    }
  }

  bool is_allowed(std::int64_t row) const {
    if (sample_.allowed == nullptr) return true;
    std::int64_t id;  // unaligned in the file
    const std::int64_t codes_bytes = sample_.sizes[list_] * sample_.code_size;
    std::memcpy(&id, sample_.codes_of(list_) + codes_bytes + row * kIdBytes, kIdBytes);
    if (id < 0 || id / sample_.pixels >= sample_.images) {
      throw std::out_of_range("a list names a patch at " + std::to_string(id) + ", where none is");
    }
    return sample_.allowed[id / sample_.pixels] != 0;
  }

  // Moves the current sums to nearer references.
  void lower(Vec reference) {
    const Vec shift[1] = {state_[kReference] - reference};
    Vec factors[1];
    exp2_nonpositive(shift, factors);
    const Vec factor = factors[0], square = factor * factor;
    const Vec mass = state_[kMass] * factor;
    for (int lane = 0; lane < kLanes; ++lane) {
      // Before the first code the reference is kNothing, and the mass is 0.
      state_[kLogitSum][lane] =
          mass[lane] > 0.0f ? state_[kLogitSum][lane] * factor[lane] + shift[0][lane] * mass[lane]
                            : 0.0f;
    }
    state_[kMass] = mass;
    state_[kSeen] *= factor;
    for (int c = 0; c < C; ++c) state_[kCentre + c] *= factor;
    for (int field = kSquares; field < kFields; ++field) state_[field] *= square;
    for (Vec& sum : begun_) sum *= factor;
    state_[kReference] = reference;
  }

  ListPlan& plan_;
  const ListSample& sample_;
  Products products_;
  float threshold_;
  Buffer<float> sums_;  // [padded][kWidth]
  std::vector<float> origin_;
  std::vector<std::uint8_t> level_;  // of every query for the current list
  std::vector<std::int32_t> found_, sorted_;
  float part_of_[kDeepest + 1];  // of a list, that a level reads
  std::vector<Block> blocks_;
  std::vector<std::uint8_t> padded_block_;
  int weighed_ = 0;   // blocks of this list, for the current queries
  Vec begun_[1 + C];  // mass and centres before it
  std::int64_t list_ = 0;
  int many_ = 0;
  const std::uint8_t* ahead_ = nullptr;  // where the block after this one is
  int lines_ = 0;                        // of it, that are yet to be prefetched

  // The current queries.
  std::int32_t members_[kLanes];
  int count_ = 0;
  int levels_[kLanes];
  Vec shift_ = {}, varies_ = {}, parts_ = {}, base_ = {};
  Vec state_[kWidth];  // [field], padded
};

}  // namespace els
