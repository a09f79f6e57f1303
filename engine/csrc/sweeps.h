// The input of the exact kernel, and the displacements from query pixels to training pixels that it
// computes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace els {

// Displacements that share the accumulators of a pixel row while these are in registers and L1.
constexpr int kMostDisplacements = 4;

struct Problem {
  // Training images, uint8 [*, C, H, W], and the numbers of those whose patches are candidates.
  const std::uint8_t* images;
  const std::int64_t* members;
  int channels, height, width;
  // Queries: float64 [B, C, H, W], and per image the signal scale and the noise.
  const double* x;
  const double* alpha;
  const double* sigma;
  int batch;
  int patch_size;
  bool equivariant;  // ELS, or else LS
  bool circular;
  bool border_only;  // with zeros beyond the border: leave out what only the middle needs
  // Members starts[g] to starts[g + 1] are group g, which has states of its own. Fixed by the input
  // alone, so that results do not depend on the number of threads.
  int groups;
  const std::int64_t* starts;
  // Results, [groups, B, ...]: float64 natural-log states; logit_sum and top may be null.
  double* reference;
  double* mass;
  double* centre;
  double* logit_sum;
  int top;
  double* top_logits;
  std::int64_t* top_addresses;

  int radius() const { return patch_size / 2; }
  int pixels() const { return height * width; }
};

// Displacements (dy + t, dx), t < count, and the query pixels that they serve: columns
// [column_begin, column_end) and, for each t, rows [row_begin[t], row_end[t]). Coordinates are
// unwrapped: in a circular query they may be negative.
struct Sweep {
  int dy, dx, count;
  int column_begin, column_end;
  int row_begin[kMostDisplacements], row_end[kMostDisplacements];

  int first_row() const { return *std::min_element(row_begin, row_begin + count); }
  int last_row() const { return *std::max_element(row_end, row_end + count); }
};

namespace detail {

// Query rows served by one displacement along one axis.
inline void axis_range(const Problem& problem, int displacement, int length, int* begin, int* end) {
  const int r = problem.radius();
  if (problem.equivariant && problem.circular) {
    // The candidate patch lies inside the training image; the query is read cyclically.
    *begin = r - displacement;
    *end = length - r - displacement;
  } else if (displacement == 0) {
    *begin = 0;
    *end = length;
  } else {
    // Only the middle slides: both ends see no border along this axis.
    *begin = r + std::max(0, -displacement);
    *end = length - r - std::max(0, displacement);
  }
}

inline void add_sweep(const Problem& problem, std::vector<Sweep>& sweeps, int dy, int dx,
                      int count) {
  Sweep sweep{};
  sweep.dy = dy;
  sweep.dx = dx;
  sweep.count = count;
  axis_range(problem, dx, problem.width, &sweep.column_begin, &sweep.column_end);
  for (int t = 0; t < count; ++t) {
    axis_range(problem, dy + t, problem.height, &sweep.row_begin[t], &sweep.row_end[t]);
  }
  sweeps.push_back(sweep);
}

}  // namespace detail

// Every displacement of the machine.
inline std::vector<Sweep> plan_sweeps(const Problem& problem) {
  std::vector<Sweep> sweeps;
  if (!problem.equivariant) {
    detail::add_sweep(problem, sweeps, 0, 0, 1);
    return sweeps;
  }
  const int r = problem.radius();
  const auto cover = [&](int dy_begin, int dy_end, int dx_begin, int dx_end) {
    for (int dy = dy_begin; dy < dy_end; dy += kMostDisplacements) {
      for (int dx = dx_begin; dx < dx_end; ++dx) {
        detail::add_sweep(problem, sweeps, dy, dx, std::min(kMostDisplacements, dy_end - dy));
      }
    }
  };
  if (problem.circular) {
    cover(0, problem.height, 0, problem.width);
    return sweeps;
  }
  const int middle_rows = problem.height - 2 * r, middle_columns = problem.width - 2 * r;
  if (problem.border_only) {
    // Where one axis slides, pixels are at the border if the other is at one of its ends.
    detail::add_sweep(problem, sweeps, 0, 0, 1);
    for (int end = 0; end < 2; ++end) {
      const int row = end == 0 ? 0 : problem.height - r;
      const int column = end == 0 ? 0 : problem.width - r;
      for (int dx = 1 - middle_columns; dx < middle_columns; ++dx) {
        if (dx == 0) continue;
        detail::add_sweep(problem, sweeps, 0, dx, 1);
        sweeps.back().row_begin[0] = row;
        sweeps.back().row_end[0] = row + r;
      }
      const auto slide = [&](int dy_begin, int dy_end) {
        for (int dy = dy_begin; dy < dy_end; dy += kMostDisplacements) {
          detail::add_sweep(problem, sweeps, dy, 0, std::min(kMostDisplacements, dy_end - dy));
          sweeps.back().column_begin = column;
          sweeps.back().column_end = column + r;
        }
      };
      slide(1 - middle_rows, 0);
      slide(1, middle_rows);
    }
    return sweeps;
  }
  cover(1 - middle_rows, 0, 1 - middle_columns, middle_columns);
  cover(0, 1, 1 - middle_columns, middle_columns);
  cover(1, middle_rows, 1 - middle_columns, middle_columns);
  return sweeps;
}

// Upper bound of a pixel's candidates in all images: it bounds what skipping may omit.
inline double most_candidates(const Problem& problem) {
  return static_cast<double>(problem.starts[problem.groups]) *
         (problem.equivariant ? static_cast<double>(problem.pixels()) : 1.0);
}

}  // namespace els
