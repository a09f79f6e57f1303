// Exact local posteriors without ever forming a patch.
//
// For a fixed displacement d between a query pixel and a training pixel, the distance of their
// patches is a P x P box filter of the pixelwise squared difference. Lanes are training images.
// Window sums are built from prefixes and suffixes of blocks of P terms (van Herk), never by
// subtracting the term that leaves the window: a float32 running sum keeps the rounding of every
// large term that it has added, which exceeds the distances that matter at small noise.
//
// All distances here are D' = log2(e) / (2 sigma^2) * ||x_patch - alpha * k_patch||^2 - offset, so
// the logit to base 2 is -(D' + offset). The offset is a bias per pixel of the patch, about what
// true noise contributes: D' stays near zero, and its rounding small, for the candidates that
// matter. Where the rounding of D' is still too large, float32 only chooses candidates, and float64
// computes their distances: the nearest patch has the largest weight however small sigma is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "buffer.h"
#include "simd.h"
#include "sweeps.h"

namespace els {

// Query rows that are computed together: as many as leave room in the registers.
constexpr int kMostRows = 3;

// One thread's work: one query against one group of image blocks at a time.
template <int C>
class Worker {
 public:
  Worker(const Problem& problem, const std::vector<Sweep>& sweeps)
      : problem_(problem), sweeps_(sweeps), radius_(problem.radius()) {
    const int r = radius_, height = problem.height, width = problem.width;
    wraps_ = problem.equivariant && problem.circular;
    query_pad_y_ = wraps_ ? height : r;
    query_pad_x_ = wraps_ ? width : r;
    query_stride_ = wraps_ ? 2 * width : width + 2 * r;
    const int query_rows = wraps_ ? 2 * height : height + 2 * r;
    query_.resize(static_cast<std::size_t>(query_rows) * query_stride_ * C);
    image_pad_x_ = wraps_ ? 0 : r;
    // Rows beyond the image are read for windows that no sweep uses.
    image_pad_y_ = std::max(wraps_ ? 0 : r, kMostDisplacements - 1);
    image_stride_ = spread((width + 2 * image_pad_x_) * C);
    image_.resize(static_cast<std::size_t>(height + 2 * image_pad_y_) * image_stride_);
    bytes_.resize(static_cast<std::size_t>(problem.pixels()) * C * kLanes);
    window_stride_ = spread(kMostDisplacements * (width + 2 * r));
    suffix_.resize(static_cast<std::size_t>(window_stride_) * problem.patch_size);
    carry_.resize(window_stride_);
    vertical_.resize(static_cast<std::size_t>(window_stride_) * kMostRows);
    row_suffix_.resize(static_cast<std::size_t>(kMostDisplacements) * problem.patch_size);
    distances_.resize(static_cast<std::size_t>(kMostDisplacements) * width);
    lanes_.resize(static_cast<std::size_t>(problem.pixels()) * kSums);
    offset_.resize(problem.pixels());
    reference_.resize(problem.pixels());
    level_.resize(problem.pixels());
    sorted_.resize(problem.pixels());
    refine_beyond_.resize(problem.pixels());
    sums_.resize(static_cast<std::size_t>(problem.pixels()) * kSums);
  }

  void run(int group, int query, const std::atomic<bool>& cancelled) {
    prepare(query);
    std::fill_n(reference_.data(), problem_.pixels(), kNowhere);
    std::fill_n(level_.data(), problem_.pixels(), kInfinity);
    std::fill_n(sums_.data(), problem_.pixels() * kSums, 0.0);
    std::fill_n(lanes_.data(), problem_.pixels() * kSums, Vec{});
    adapt_limits();
    const std::size_t slot = static_cast<std::size_t>(group) * problem_.batch + query;
    if (problem_.top > 0) {
      const std::size_t count = static_cast<std::size_t>(problem_.pixels()) * problem_.top;
      top_distances_ = problem_.top_logits + slot * count;
      top_addresses_ = problem_.top_addresses + slot * count;
      std::fill_n(top_distances_, count, std::numeric_limits<double>::infinity());
      std::fill_n(top_addresses_, count, -1);
    }
    const std::int64_t begin = problem_.starts[group], end = problem_.starts[group + 1];
    std::size_t done = 0;
    for (std::int64_t member = begin; member < end; member += kLanes) {
      load(member, end);
      if (member == begin) find_references();
      for (const Sweep& sweep : sweeps_) {
        if (cancelled.load(std::memory_order_relaxed)) return;
        run_sweep(sweep);
        // Often at first, while the nearest patches are still being found, then less often. Lanes
        // are float32: they are added to float64 sums before their rounding matters.
        ++done;
        if ((done & (done - 1)) == 0 || done % 128 == 0) {
          flush();
          adapt_bias();
          adapt_limits();
        }
      }
    }
    flush();
    finish(slot);
  }

 private:
  // Per pixel: mass, logit_sum, one centre per channel.
  static constexpr int kMass = 0, kLogitSum = 1, kCentre = 2, kSums = 2 + C;

  void prepare(int query) {
    const int height = problem_.height, width = problem_.width, pixels = problem_.pixels();
    alpha_ = problem_.alpha[query];
    x_ = problem_.x + static_cast<std::size_t>(query) * C * pixels;
    const double sigma = problem_.sigma[query];
    precision_ = kLog2E / (2.0 * sigma * sigma);
    double brightest = 0.0;
    for (int i = 0; i < C * pixels; ++i) brightest = std::max(brightest, std::abs(x_[i]));
    const double furthest = precision_ * (brightest + alpha_) * (brightest + alpha_) * area() * C;
    shrink_ = std::min(1.0, kFurthest / furthest);
    const double scale = std::sqrt(shrink_ * precision_);
    // Centres are read off the scaled images, so alpha = 0 becomes a number too small to matter,
    // but large enough for float32.
    image_scale_ = std::max(alpha_ * scale, 1e-20);
    double power = 0.0, largest = image_scale_;
    for (int i = 0; i < C * pixels; ++i) {
      const double value = scale * x_[i];
      power += value * value;
      largest = std::max(largest, std::abs(value));
    }
    largest_ = largest;
    typical_ = std::sqrt(power / (C * pixels));
    threshold_ = static_cast<float>(shrink_ * (22.0 + std::log2(most_candidates(problem_))));
    set_bias(std::min(0.5 * kLog2E * C, power / pixels));

    const int rows = wraps_ ? 2 * height : height + 2 * radius_;
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < query_stride_; ++column) {
        int y = row - query_pad_y_, v = column - query_pad_x_;
        const bool inside = y >= 0 && y < height && v >= 0 && v < width;
        y = (y + height) % height;
        v = (v + width) % width;
        for (int c = 0; c < C; ++c) {
          const double value = inside || problem_.circular ? x_[(c * height + y) * width + v] : 0.0;
          query_[(static_cast<std::size_t>(row) * query_stride_ + column) * C + c] =
              static_cast<float>(scale * value);
        }
      }
    }
  }

  void set_bias(double bias) {
    bias_ = static_cast<float>(bias);
    for (int pixel = 0; pixel < problem_.pixels(); ++pixel) {
      offset_[pixel] = static_cast<double>(bias_) * inside(pixel);
    }
  }

  // A few displacements, without weights: references, and the bias that follows them, then start
  // near their final values, and few pixels wait for their first exact distance.
  void find_references() {
    const int pixels = problem_.pixels();
    for (int pixel = 0; pixel < pixels; ++pixel) nearest(pixel) = splat(kInfinity);
    looking_ = true;
    for (std::size_t i = 0; i < sweeps_.size(); ++i) {
      // Border pixels have candidates in the sweeps without a shift only.
      if (i % 8 == 0 || sweeps_[i].dx == 0) run_sweep(sweeps_[i]);
    }
    looking_ = false;
    for (int pixel = 0; pixel < pixels; ++pixel) {
      level_[pixel] = min_lane(nearest(pixel));
      nearest(pixel) = Vec{};
      if (level_[pixel] == kInfinity) continue;
      reference_[pixel] = (static_cast<double>(level_[pixel]) + offset_[pixel]) / shrink_;
    }
    adapt_bias();
    adapt_limits();
    for (int pixel = 0; pixel < pixels; ++pixel) {
      // A coarse distance may be off by more than a double's exponent: it is no reference.
      if (!is_coarse(pixel)) continue;
      reference_[pixel] = kNowhere;
      level_[pixel] = kInfinity;
    }
  }

  Vec& nearest(int pixel) { return lanes_[static_cast<std::size_t>(pixel) * kSums]; }

  template <int kStride>
  void look(const Sweep& sweep, int row, int begin, int end) {
    const int y = wrapped(row, problem_.height);
    for (int column = 0; column < sweep.column_end - sweep.column_begin; ++column) {
      Vec& least =
          nearest(y * problem_.width + wrapped(sweep.column_begin + column, problem_.width));
      for (int t = begin; t < end; ++t) least = min(least, distances_[column * kStride + t]);
    }
  }

  // Far off the manifold distances exceed what sigma predicts: the bias follows the nearest
  // patches.
  void adapt_bias() {
    constexpr float kClose = 32.0f;
    const int pixels = problem_.pixels();
    std::copy_n(level_.data(), pixels, sorted_.data());
    float* const middle = sorted_.data() + pixels / 2;
    std::nth_element(sorted_.data(), middle, sorted_.data() + pixels);
    if (*middle == kInfinity || std::abs(*middle) <= kClose) return;
    set_bias(std::max(0.0, bias_ + *middle / area()));
    for (int pixel = 0; pixel < pixels; ++pixel) refer_to(pixel, reference_[pixel]);
    if (!problem_.circular) clear_border();
  }

  // Weights are at most 1, so the mass bounds the number of equal weights with the same rounding
  // error.
  void adapt_limits() {
    for (int pixel = 0; pixel < problem_.pixels(); ++pixel) {
      refine_beyond_[pixel] =
          refinement_limit(sums_[static_cast<std::size_t>(pixel) * kSums + kMass]);
      refer_to(pixel, reference_[pixel]);
    }
  }

  double area() const { return static_cast<double>(problem_.patch_size) * problem_.patch_size; }

  // How many of the P * P coordinates of the patch around a pixel are read from the image.
  int inside(int pixel) const {
    return inside(pixel / problem_.width, problem_.height) *
           inside(pixel % problem_.width, problem_.width);
  }

  int inside(int coordinate, int length) const {
    if (problem_.circular) return problem_.patch_size;
    return std::min(coordinate + radius_, length - 1) - std::max(coordinate - radius_, 0) + 1;
  }

  // The |D'| beyond which float32 is not good enough, and candidates are measured again in float64.
  // The root-mean-square error of a float32 D', fitted to measurements (docs/performance.md), is
  // 2^-24 * (1.2 |D'| + 1.2 * typical * sqrt(D) + P * bias): of its own rounding, of the scaled
  // coordinates, of the partial sums. Among n equal weights it averages out to a sqrt(n)-th part.
  float refinement_limit(double equal_weights) const {
    if (shrink_ < 1.0) return -1.0f;
    constexpr double kTolerated = 1e-5 / kUnit;
    const double room =
        kTolerated * std::sqrt(std::max(1.0, equal_weights)) - problem_.patch_size * bias_;
    const double whole = bias_ * area();
    const double square = typical_ * typical_ + 4.0 * (whole + room / 1.2);
    if (square <= 0.0) return -1.0f;
    const double root = 0.5 * (std::sqrt(square) - typical_);
    return root <= 0.0 ? -1.0f : static_cast<float>(std::max(-1.0, root * root - whole));
  }

  // A bound, not an estimate: no float32 D' is further than this from the true one.
  float float_slack(float distance) const {
    const double total = std::abs(static_cast<double>(distance)) + bias_ * area();
    return static_cast<float>(kUnit * (4.0 * (problem_.patch_size + C) * total +
                                       8.0 * largest_ * std::sqrt(total * area() * C)));
  }

  // Members begin.. of a group that ends at `end`.
  void load(std::int64_t begin, std::int64_t end) {
    const int height = problem_.height, width = problem_.width, pixels = problem_.pixels();
    filled_ = static_cast<int>(std::min<std::int64_t>(kLanes, end - begin));
    for (int lane = 0; lane < filled_; ++lane) {
      member_[lane] = problem_.members[begin + lane];
      const std::uint8_t* image =
          problem_.images + static_cast<std::size_t>(member_[lane]) * C * pixels;
      for (int c = 0; c < C; ++c) {
        for (int i = 0; i < pixels; ++i)
          bytes_[(i * C + c) * kLanes + lane] = image[c * pixels + i];
      }
    }
    // Lanes without an image get distances so large that their weight is exactly zero.
    Vec scale{}, shift{};
    for (int lane = 0; lane < kLanes; ++lane) {
      scale[lane] = lane < filled_ ? static_cast<float>(image_scale_ / 127.5) : 0.0f;
      shift[lane] = lane < filled_ ? static_cast<float>(-image_scale_) : 1e15f;
    }
    for (int y = 0; y < height; ++y) {
      const std::uint8_t* from = bytes_.data() + static_cast<std::size_t>(y) * width * C * kLanes;
      Vec* to = image_row(y) + image_pad_x_ * C;
      for (int i = 0; i < width * C; ++i) {
        to[i] = bytes_to_floats(from + i * kLanes) * scale + shift;
      }
    }
    if (problem_.circular) {
      if (!problem_.equivariant) wrap_image();
    } else {
      clear_border();
    }
  }

  // Beyond the border the query is 0, and an image reads what makes the biased term vanish.
  void clear_border() {
    const Vec value = splat(static_cast<float>(std::sqrt(bias_ / C)));
    const int side = image_pad_x_ * C, height = problem_.height;
    const int row = (problem_.width + 2 * image_pad_x_) * C;
    for (int y = -image_pad_y_; y < height + image_pad_y_; ++y) {
      Vec* to = image_row(y);
      const bool outside = y < 0 || y >= height;
      std::fill_n(to, outside ? row : side, value);
      if (!outside) std::fill_n(to + row - side, side, value);
    }
  }

  void wrap_image() {
    const int r = radius_, height = problem_.height, width = problem_.width;
    for (int y = -r; y < height + r; ++y) {
      const Vec* from = image_row((y + height) % height) + image_pad_x_ * C;
      Vec* to = image_row(y) + image_pad_x_ * C;
      for (int v = -r; v < width + r; ++v) {
        const int wrapped = (v + width) % width;
        for (int c = 0; c < C; ++c) to[v * C + c] = from[wrapped * C + c];
      }
    }
  }

  Vec* image_row(int y) {
    return image_.data() + static_cast<std::ptrdiff_t>(y + image_pad_y_) * image_stride_;
  }

  // A row length, in vectors, that keeps neighbouring rows out of one another's cache sets.
  static int spread(int length) { return (length + 16) | 1; }

  void run_sweep(const Sweep& sweep) {
    if (sweep.first_row() >= sweep.last_row() || sweep.column_begin >= sweep.column_end) return;
    if (sweep.count == 1) return run_blocks<1>(sweep);
    run_blocks<kMostDisplacements>(sweep);
  }

  // Rows of squared differences come in blocks of P terms. A window of P terms that ends inside a
  // block is the sum of that block's terms so far and of a suffix of the block before.
  template <int kCount>
  void run_blocks(const Sweep& sweep) {
    const int patch = problem_.patch_size;
    const int row = sweep.first_row() - radius_;  // of term 0
    const int terms = sweep.last_row() - sweep.first_row() + patch - 1;
    if (patch == 1) {
      for (int i = 0; i < terms; i += kMostRows) {
        const int rows = std::min(kMostRows, terms - i);
        add_rows<kCount, kDifferences>(sweep, row + i, 0, rows);
        emit_rows<kCount>(sweep, row + i, rows);
      }
      return;
    }
    for (int i = patch; i > 0;) {
      const int rows = (i - 1) % kMostRows + 1;
      i -= rows;
      add_rows<kCount, kSuffixes>(sweep, row + i, i, rows);
    }
    emit_rows<kCount>(sweep, row + radius_, 1);
    for (int start = patch; start < terms; start += patch) {
      const int count = std::min(patch, terms - start);
      const bool last = start + patch >= terms;
      for (int i = 0; i < count; i += kMostRows) {
        const int rows = std::min(kMostRows, count - i);
        if (last) {
          add_rows<kCount, kPrefixes>(sweep, row + start + i, i, rows);
        } else {
          add_rows<kCount, kPrefixesKept>(sweep, row + start + i, i, rows);
        }
        emit_rows<kCount>(sweep, row + start + i - radius_, rows);
      }
      if (!last) make_suffixes<kCount>(sweep);
    }
  }

  // What add_rows stores beside the carry:
  enum Mode {
    kDifferences,   // P = 1: windows are the terms
    kSuffixes,      // suffixes of a block without windows, from its last row up, and its whole sum
    kPrefixes,      // windows
    kPrefixesKept,  // windows, and the terms in the slots of used suffixes, for make_suffixes
  };

  template <int kCount, Mode kMode>
  void add_rows(const Sweep& sweep, int row, int i, int rows) {
    switch (rows) {
      case 1:
        return add_tile<kCount, kMode, 1>(sweep, row, i);
      case 2:
        return add_tile<kCount, kMode, 2>(sweep, row, i);
      case 3:
        return add_tile<kCount, kMode, 3>(sweep, row, i);
    }
  }

  // Squared differences of query rows row.. (terms i.. of their block) under kCount displacements.
  template <int kCount, Mode kMode, int kRows>
  void add_tile(const Sweep& sweep, int row, int i) {
    static_assert(kRows <= kMostRows, "vertical_ has kMostRows rows");
    const int width = sweep.column_end - sweep.column_begin + 2 * radius_;
    const int left = sweep.column_begin - radius_;
    const int patch = problem_.patch_size;
    const float* query =
        query_.data() +
        (static_cast<std::ptrdiff_t>(row + query_pad_y_) * query_stride_ + left + query_pad_x_) * C;
    const Vec* image = image_row(row + sweep.dy) + (left + sweep.dx + image_pad_x_) * C;
    const std::ptrdiff_t query_step = static_cast<std::ptrdiff_t>(query_stride_) * C;
    const std::ptrdiff_t stride = window_stride_;
    Vec* const suffix = suffix_.data() + i * stride;
    Vec* const vertical = vertical_.data();
    Vec* const carries = carry_.data();
    const Vec bias = splat(-bias_);
    const bool at_top = i == 0, at_bottom = i + kRows == patch;
    const bool fresh = kMode == kSuffixes ? at_bottom : at_top;
    const bool done = kMode == kSuffixes ? at_top : at_bottom;
    // Where the image is hardly larger than the patch, most suffixes are longer than any window
    // needs.
    const int windows = sweep.last_row() - sweep.first_row();
    for (int column = 0; column < width; ++column) {
      Vec x[kRows][C];
      for (int j = 0; j < kRows; ++j) {
        for (int c = 0; c < C; ++c) x[j][c] = splat(query[j * query_step + column * C + c]);
      }
      // An image row serves up to kCount pairs of this tile, so it is loaded here, once.
      Vec k[kRows + kCount - 1][C];
      for (int j = 0; j < kRows + kCount - 1; ++j) {
        for (int c = 0; c < C; ++c) k[j][c] = image[j * image_stride_ + column * C + c];
      }
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(column) * kCount;
      Vec carry[kCount];
      for (int t = 0; t < kCount; ++t) carry[t] = fresh ? Vec{} : carries[at + t];
      for (int step = 0; step < kRows; ++step) {
        const int j = kMode == kSuffixes ? kRows - 1 - step : step;
        Vec term[kCount];
        for (int t = 0; t < kCount; ++t) term[t] = bias;
        for (int c = 0; c < C; ++c) {
          for (int t = 0; t < kCount; ++t) {
            const Vec difference = x[j][c] - k[j + t][c];
            term[t] += difference * difference;
          }
        }
        Vec* const sum = vertical + j * stride + at;
        Vec* const slot = suffix + j * stride + at;
        for (int t = 0; t < kCount; ++t) carry[t] += term[t];
        if (kMode == kDifferences) {
          for (int t = 0; t < kCount; ++t) sum[t] = term[t];
        } else if (kMode == kSuffixes) {
          if (i + j >= windows) continue;
          for (int t = 0; t < kCount; ++t) slot[t] = carry[t];
        } else {
          for (int t = 0; t < kCount; ++t) {
            sum[t] = i + j + 1 < patch ? carry[t] + slot[stride + t] : carry[t];
          }
          if (kMode == kPrefixesKept) {
            for (int t = 0; t < kCount; ++t) slot[t] = term[t];
          }
        }
      }
      for (int t = 0; t < kCount; ++t) {
        if (!done) carries[at + t] = carry[t];
        if (kMode == kSuffixes && done) vertical[at + t] = carry[t];
      }
    }
  }

  template <int kCount>
  void make_suffixes(const Sweep& sweep) {
    const int width = sweep.column_end - sweep.column_begin + 2 * radius_;
    for (int i = problem_.patch_size - 2; i > 0; --i) {
      Vec* const suffix = suffix_.data() + static_cast<std::ptrdiff_t>(i) * window_stride_;
      for (int at = 0; at < kCount * width; ++at) suffix[at] += suffix[window_stride_ + at];
    }
  }

  // Finishes the windows of the current vertical sums, which are centred on query rows row..
  template <int kCount>
  void emit_rows(const Sweep& sweep, int row, int rows) {
    const int columns = sweep.column_end - sweep.column_begin;
    for (int j = 0; j < rows; ++j) {
      int first = kCount, last = 0;
      for (int t = 0; t < sweep.count; ++t) {
        if (row + j < sweep.row_begin[t] || row + j >= sweep.row_end[t]) continue;
        first = std::min(first, t);
        last = t + 1;
      }
      if (first >= last) continue;
      sum_row<kCount>(vertical_.data() + static_cast<std::ptrdiff_t>(j) * window_stride_, columns,
                      distances_.data());
      accumulate<kCount>(sweep, row + j, first, last);
    }
  }

  template <int kCount>
  void sum_row(const Vec* terms, int columns, Vec* sums) {
    switch (problem_.patch_size) {
      case 1:
        std::copy_n(terms, columns * kCount, sums);
        return;
      case 3:
        return sum_windows<kCount, 3>(terms, columns, sums);
      case 5:
        return sum_windows<kCount, 5>(terms, columns, sums);
      default:
        return sum_windows<kCount, 0>(terms, columns, sums);
    }
  }

  // Sums of P consecutive terms along a row, in lockstep for kCount displacements; kPatch = 0 for a
  // size too large for registers.
  template <int kCount, int kPatch>
  void sum_windows(const Vec* terms, int columns, Vec* sums) {
    const int patch = kPatch > 0 ? kPatch : problem_.patch_size;
    Vec registers[kPatch > 0 ? kPatch * kCount : 1];
    Vec* const suffix = kPatch > 0 ? registers : row_suffix_.data();
    const auto finish_block = [&](const Vec* block, Vec* whole) {
      Vec sum[kCount];
      for (int t = 0; t < kCount; ++t) {
        sum[t] = suffix[(patch - 1) * kCount + t] = block[(patch - 1) * kCount + t];
      }
#pragma GCC unroll 8
      for (int i = patch - 2; i > 0; --i) {
        for (int t = 0; t < kCount; ++t) suffix[i * kCount + t] = sum[t] += block[i * kCount + t];
      }
      for (int t = 0; t < kCount; ++t) whole[t] = sum[t] + block[t];
    };
    const auto add_term = [&](const Vec* block, int i, Vec* prefix, Vec* sum) {
      for (int t = 0; t < kCount; ++t) {
        prefix[t] += block[i * kCount + t];
        sum[t] = prefix[t] + suffix[(i + 1) * kCount + t];
      }
    };
    finish_block(terms, sums);
    const Vec* block = terms + patch * kCount;
    sums += kCount;
    int left = columns - 1;
    for (; left >= patch; left -= patch, block += patch * kCount, sums += patch * kCount) {
      Vec prefix[kCount] = {};
#pragma GCC unroll 8
      for (int i = 0; i < patch - 1; ++i) add_term(block, i, prefix, sums + i * kCount);
      finish_block(block, sums + (patch - 1) * kCount);
    }
    Vec prefix[kCount] = {};
    for (int i = 0; i < left; ++i) add_term(block, i, prefix, sums + i * kCount);
  }

  // Adds displacements begin..end of a query row to its pixels; distances are kStride apart.
  template <int kStride>
  void accumulate(const Sweep& sweep, int row, int begin, int end) {
    if (looking_) return look<kStride>(sweep, row, begin, end);
    if (problem_.logit_sum != nullptr) {
      accumulate_row<kStride, true>(sweep, row, begin, end);
    } else {
      accumulate_row<kStride, false>(sweep, row, begin, end);
    }
    if (problem_.top > 0) rank_row<kStride>(sweep, row, begin, end);
  }

  template <int kStride, bool kHasLogitSum>
  void accumulate_row(const Sweep& sweep, int row, int begin, int end) {
    if (kStride == 1) return accumulate_some<kStride, kHasLogitSum, 1>(sweep, row, begin);
    switch (end - begin) {
      case 1:
        return accumulate_some<kStride, kHasLogitSum, 1>(sweep, row, begin);
      case 2:
        return accumulate_some<kStride, kHasLogitSum, 2>(sweep, row, begin);
      case 3:
        return accumulate_some<kStride, kHasLogitSum, 3>(sweep, row, begin);
      case 4:
        return accumulate_some<kStride, kHasLogitSum, 4>(sweep, row, begin);
    }
  }

  template <int kStride, bool kHasLogitSum, int kCount>
  void accumulate_some(const Sweep& sweep, int row, int begin) {
    const int columns = sweep.column_end - sweep.column_begin;
    const int y = (row + problem_.height) % problem_.height;
    const Vec* k =
        image_row(row + sweep.dy + begin) + (sweep.column_begin + sweep.dx + image_pad_x_) * C;
    const Vec* distances = distances_.data() + begin;
    int pixel = y * problem_.width + (sweep.column_begin + problem_.width) % problem_.width;
    const int wrap = (y + 1) * problem_.width;
    for (int column = 0; column < columns; ++column, ++pixel, distances += kStride, k += C) {
      if (pixel == wrap) pixel -= problem_.width;
      Vec nearest = distances[0];
      for (int t = 1; t < kCount; ++t) nearest = min(nearest, distances[t]);
      const float before = level_[pixel];
      bool coarse = is_coarse(pixel);
      const float limit = before + threshold_ + (coarse ? float_slack(before) : 0.0f);
      if (mask_less(nearest, splat(limit)) == 0) continue;
      if (!coarse && mask_less(nearest, splat(before)) != 0) {
        const float least = min_lane(nearest);
        coarse = std::abs(least) > refine_beyond_[pixel];
        if (!coarse) {
          refer_to(pixel, static_cast<double>(least) + offset_[pixel]);
          coarse = is_coarse(pixel);
        }
      }
      if (coarse) {
        accumulate_refined<kStride>(sweep, row, column, begin, begin + kCount, pixel);
        continue;
      }
      const Vec level = splat(level_[pixel]);
      Vec* const sums = lanes_.data() + static_cast<std::size_t>(pixel) * kSums;
      Vec mass = sums[kMass], logit_sum = kHasLogitSum ? sums[kLogitSum] : Vec{};
      Vec centre[C];
      for (int c = 0; c < C; ++c) centre[c] = sums[kCentre + c];
      Vec exponent[kCount], weight[kCount];
      for (int t = 0; t < kCount; ++t) exponent[t] = level - distances[t];
      exp2_nonpositive(exponent, weight);
      for (int t = 0; t < kCount; ++t) {
        mass += weight[t];
        if (kHasLogitSum) logit_sum += weight[t] * exponent[t];
        for (int c = 0; c < C; ++c) centre[c] += weight[t] * k[t * image_stride_ + c];
      }
      sums[kMass] = mass;
      if (kHasLogitSum) sums[kLogitSum] = logit_sum;
      for (int c = 0; c < C; ++c) sums[kCentre + c] = centre[c];
    }
  }

  bool is_coarse(int pixel) const { return std::abs(level_[pixel]) > refine_beyond_[pixel]; }

  // Makes a pixel's sums relative to a whole distance. `level` is the same distance as a D'; where
  // float32 sums are relative to it, it is the reference exactly. Inlined, it would take registers
  // from the loop that rarely calls it.
  [[gnu::noinline]] void refer_to(int pixel, double reference) {
    const double old = reference_[pixel];
    if (reference == kNowhere) return;
    level_[pixel] = static_cast<float>(shrink_ * reference - offset_[pixel]);
    if (!is_coarse(pixel)) reference = static_cast<double>(level_[pixel]) + offset_[pixel];
    reference_[pixel] = reference;
    if (old != kNowhere && old != reference) rescale(pixel, reference - old);
  }

  // Moves a pixel's sums to a reference distance that is further by `shift`.
  void rescale(int pixel, double shift) {
    const double scale = std::exp2(shift);
    // A much nearer patch has been found: the weights so far become small.
    if (scale < 0.5) refine_beyond_[pixel] = refinement_limit(1.0);
    Vec* lanes = lanes_.data() + static_cast<std::size_t>(pixel) * kSums;
    double* sums = sums_.data() + static_cast<std::size_t>(pixel) * kSums;
    if (scale == 0.0) shift = 0.0;  // the sums are 0, and the shift may exceed float32
    lanes[kLogitSum] += static_cast<float>(shift) * lanes[kMass];
    sums[kLogitSum] += shift * sums[kMass];
    for (int i = 0; i < kSums; ++i) {
      lanes[i] *= static_cast<float>(scale);
      sums[i] *= scale;
    }
  }

  // The slow path: float32 has chosen the candidates that could matter, float64 weighs them.
  template <int kStride>
  void accumulate_refined(const Sweep& sweep, int row, int column, int begin, int end, int pixel) {
    double* const sums = sums_.data() + static_cast<std::size_t>(pixel) * kSums;
    for (int t = begin; t < end; ++t) {
      const Vec distances = distances_[column * kStride + t];
      const float limit = level_[pixel] + threshold_ + float_slack(level_[pixel]);
      const std::uint32_t mask = mask_less(distances, splat(limit));
      if (mask == 0) continue;
      const int v = sweep.column_begin + column;
      double exact[kLanes];
      exact_distances(row, v, sweep.dy + t, sweep.dx, exact);
      for (int lane = 0; lane < filled_; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        if (exact[lane] < reference_[pixel]) refer_to(pixel, exact[lane]);
        const double exponent = reference_[pixel] - exact[lane];
        const double weight = std::exp2(exponent);
        if (weight == 0.0) continue;
        sums[kMass] += weight;
        sums[kLogitSum] += weight * exponent;
        const std::uint8_t* const centre = image_bytes(row + sweep.dy + t, v + sweep.dx) + lane;
        for (int c = 0; c < C; ++c) {
          sums[kCentre + c] += weight * image_scale_ * (centre[c * kLanes] / 127.5 - 1.0);
        }
      }
    }
  }

  // The whole distance to every image of the block from the definition, in float64.
  void exact_distances(int row, int column, int dy, int dx, double (&distances)[kLanes]) const {
    const int r = radius_, height = problem_.height, width = problem_.width;
    const double scale = alpha_ / 127.5;
    double sums[kLanes] = {};
    for (int y = row - r; y <= row + r; ++y) {
      if (!problem_.circular && (y < 0 || y >= height)) continue;
      const int query_y = wrapped(y, height), image_y = wrapped(y + dy, height);
      for (int v = column - r; v <= column + r; ++v) {
        if (!problem_.circular && (v < 0 || v >= width)) continue;
        const double* x = x_ + query_y * width + wrapped(v, width);
        const std::uint8_t* bytes = image_bytes(image_y, wrapped(v + dx, width));
        for (int c = 0; c < C; ++c) {
          const double shifted = x[c * problem_.pixels()] + alpha_;
          for (int lane = 0; lane < kLanes; ++lane) {
            const double difference = shifted - scale * bytes[c * kLanes + lane];
            sums[lane] += difference * difference;
          }
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) distances[lane] = precision_ * sums[lane];
  }

  // The pixel of every image of the block, [C][lane].
  const std::uint8_t* image_bytes(int y, int v) const {
    return bytes_.data() + static_cast<std::size_t>(y * problem_.width + v) * C * kLanes;
  }

  static int wrapped(int coordinate, int length) {
    if (coordinate < 0) return coordinate + length;
    return coordinate < length ? coordinate : coordinate - length;
  }

  template <int kStride>
  void rank_row(const Sweep& sweep, int row, int begin, int end) {
    const int columns = sweep.column_end - sweep.column_begin;
    const int y = (row + problem_.height) % problem_.height;
    for (int column = 0; column < columns; ++column) {
      const int v = sweep.column_begin + column;
      const std::size_t pixel = y * problem_.width + (v + problem_.width) % problem_.width;
      TopList list(problem_.top, top_distances_ + pixel * problem_.top,
                   top_addresses_ + pixel * problem_.top);
      for (int t = begin; t < end; ++t) {
        const float worst = static_cast<float>(shrink_ * list.worst() - offset_[pixel]);
        const Vec limit = splat(worst == kInfinity ? worst : worst + float_slack(worst));
        const std::uint32_t mask = mask_less(distances_[column * kStride + t], limit);
        if (mask == 0) continue;
        double exact[kLanes];
        exact_distances(row, v, sweep.dy + t, sweep.dx, exact);
        for (int lane = 0; lane < filled_; ++lane) {
          if ((mask >> lane & 1) == 0) continue;
          const std::int64_t image_y = row + sweep.dy + t, image_v = v + sweep.dx;
          list.insert(exact[lane],
                      (member_[lane] * problem_.height + image_y) * problem_.width + image_v);
        }
      }
    }
  }

  void flush() {
    for (int i = 0; i < problem_.pixels() * kSums; ++i) {
      sums_[i] += sum_lanes(lanes_[i]);
      lanes_[i] = Vec{};
    }
  }

  // To natural logarithms and unscaled centres.
  void finish(std::size_t slot) {
    const int pixels = problem_.pixels();
    for (int pixel = 0; pixel < pixels; ++pixel) {
      const double* sums = sums_.data() + static_cast<std::size_t>(pixel) * kSums;
      const std::size_t out = slot * pixels + pixel;
      problem_.reference[out] = -kLn2 * reference_[pixel];
      problem_.mass[out] = sums[kMass];
      if (problem_.logit_sum != nullptr) problem_.logit_sum[out] = kLn2 * sums[kLogitSum];
      for (int c = 0; c < C; ++c) {
        problem_.centre[(slot * C + c) * pixels + pixel] = sums[kCentre + c] / image_scale_;
      }
    }
    if (problem_.top > 0) {
      const std::size_t count = static_cast<std::size_t>(pixels) * problem_.top;
      for (std::size_t i = 0; i < count; ++i) top_distances_[i] *= -kLn2;
    }
  }

  const Problem& problem_;
  const std::vector<Sweep>& sweeps_;
  const int radius_;
  bool wraps_;
  int query_pad_y_, query_pad_x_, query_stride_;
  int image_pad_y_, image_pad_x_, image_stride_, window_stride_;

  // The query of this task.
  const double* x_ = nullptr;
  double alpha_ = 0.0, precision_ = 0.0, image_scale_ = 0.0, largest_ = 0.0, typical_ = 0.0;
  // Factor of the whole distances, so that float32 holds them; 1 unless they are near its limit.
  double shrink_ = 1.0;
  float bias_ = 0.0f, threshold_ = 0.0f;
  Buffer<float> query_;    // scaled, padded, [rows][columns][C]
  Buffer<double> offset_;  // [H][W]: D' + offset is the whole distance, shrunk

  // The current block of images.
  int filled_ = 0;
  std::int64_t member_[kLanes] = {};
  Buffer<std::uint8_t> bytes_;  // [y][x][C][lane]
  Buffer<Vec> image_;           // scaled, padded, [y][x][C], image_stride_ a row

  // Unfinished window sums.
  Buffer<Vec> suffix_;      // [P][column][displacement]: sums of terms i..P-1 of the block before
  Buffer<Vec> carry_;       // [column][displacement]: sums of the terms so far of this block
  Buffer<Vec> vertical_;    // [row][column][displacement]: sums of P terms
  Buffer<Vec> row_suffix_;  // [P][displacement]
  Buffer<Vec> distances_;   // [column][displacement]

  bool looking_ = false;

  // The state of every pixel: lanes in float32, added to float64 sums, both relative to a
  // whole distance.
  Buffer<Vec> lanes_;
  Buffer<double> reference_;
  Buffer<float> level_, sorted_;  // the reference as a D'
  Buffer<float> refine_beyond_;   // see refinement_limit
  Buffer<double> sums_;
  double* top_distances_ = nullptr;
  std::int64_t* top_addresses_ = nullptr;
};

}  // namespace els
