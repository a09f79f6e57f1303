// Distances from query patches to candidates given by address, in double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace els {

struct Candidates {
  const std::uint8_t* images;  // uint8 [*, C, H, W]
  const double* x;             // [B, C, H, W]
  const double* alpha;         // [B]
  const double* sigma;         // [B]
  int batch, channels, height, width, patch_size;
  bool circular;                  // both patches are read cyclically, else both read 0 outside
  const std::int64_t* addresses;  // [B, H * W, k]: (n * H + y) * W + x, -1 for none
  std::int64_t candidates;        // k
  double* logits;                 // [B, H * W, k]; -inf for none
  std::uint8_t* centres;          // [B, H * W, k, C]
};

// The candidates of one query pixel; `patch` and `sums` are room for C * P * P and P numbers.
inline void weigh_candidates(const Candidates& problem, std::int64_t query, int pixel,
                             std::vector<double>& patch, std::vector<double>& sums) {
  const int C = problem.channels, H = problem.height, W = problem.width, P = problem.patch_size;
  const int pixels = H * W, radius = P / 2;
  const auto inside = [](int i, int length) { return i >= 0 && i < length; };
  const auto wrapped = [](int i, int length) { return (i + length) % length; };
  const double* x = problem.x + query * C * pixels;
  for (int c = 0; c < C; ++c) {
    for (int i = 0; i < P; ++i) {
      for (int j = 0; j < P; ++j) {
        const int y = pixel / W + i - radius, v = pixel % W + j - radius;
        const bool reads = problem.circular || (inside(y, H) && inside(v, W));
        patch[(c * P + i) * P + j] = reads ? x[(c * H + wrapped(y, H)) * W + wrapped(v, W)] : 0.0;
      }
    }
  }
  const double scale = problem.alpha[query] / 127.5, shift = problem.alpha[query];
  const double precision = -0.5 / (problem.sigma[query] * problem.sigma[query]);
  const std::int64_t first = (query * pixels + pixel) * problem.candidates;
  for (std::int64_t k = first; k < first + problem.candidates; ++k) {
    const std::int64_t address = problem.addresses[k];
    if (address < 0) {
      problem.logits[k] = -std::numeric_limits<double>::infinity();
      for (int c = 0; c < C; ++c) problem.centres[k * C + c] = 0;
      continue;
    }
    const std::uint8_t* image = problem.images + address / pixels * (C * pixels);
    const int place = static_cast<int>(address % pixels), y = place / W, v = place % W;
    const bool whole = y >= radius && y < H - radius && v >= radius && v < W - radius;
    // A sum per column, so that the compiler may add several at a time, always in this order.
    for (int j = 0; j < P; ++j) sums[j] = 0.0;
    for (int c = 0; c < C; ++c) {
      for (int i = 0; i < P; ++i) {
        const double* noisy = &patch[(c * P + i) * P];
        const int row = y + i - radius;
        if (whole) {
          const std::uint8_t* clean = image + (c * H + row) * W + v - radius;
          for (int j = 0; j < P; ++j) {
            const double difference = noisy[j] - (scale * clean[j] - shift);
            sums[j] += difference * difference;
          }
        } else {
          for (int j = 0; j < P; ++j) {
            const int column = v + j - radius;
            const bool reads = problem.circular || (inside(row, H) && inside(column, W));
            const int at = (c * H + wrapped(row, H)) * W + wrapped(column, W);
            const double difference = noisy[j] - (reads ? scale * image[at] - shift : 0.0);
            sums[j] += difference * difference;
          }
        }
      }
    }
    double distance = 0.0;
    for (int j = 0; j < P; ++j) distance += sums[j];
    problem.logits[k] = precision * distance;
    for (int c = 0; c < C; ++c) problem.centres[k * C + c] = image[c * pixels + place];
  }
}

}  // namespace els
