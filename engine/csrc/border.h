// Posteriors of the pixels near a border of zeros, on the matrix unit.
//
// Such a pixel's candidates are the patches with the same place relative to the border. Along an
// edge they slide: seen from the edge, an image's outermost 2 r pixels are a strip, stored position
// after position, in which a patch is a contiguous run of bytes. So the products of all patches
// with all queries of an edge are products of matrices that exist already; a query is zero where
// its own patch ends sooner than the strip. In a corner nothing slides: the rows are images.
//
// Lanes are queries, rounded to 16 bits. All exponents are to base 2: that of a patch k (bytes) for
// a query w = x + alpha is scale * (2 step w.k - step^2 |k|^2) with step = alpha / 127.5 and
// scale = log2(e) / (2 sigma^2), the logit less what depends on the query alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "buffer.h"
#include "simd.h"
#include "tiles.h"

#if defined(ELS_HAS_TILES)
namespace els {

constexpr int kMostBorder = kLanes;  // the largest radius

struct Border {
  // Training images, uint8 [*, C, H, W]; members of group g are members[starts[g] .. starts[g+1]).
  const std::uint8_t* images;
  const std::int64_t* members;
  const std::int64_t* starts;
  int groups;
  int channels, height, width;
  const float* x;  // the query, [C, H, W]
  // Which of the border's pixels to weigh, [H, W]; of a corner all, if any.
  const std::uint8_t* wanted;
  double alpha, sigma;
  int patch_size;
  // Results, [groups, ...]: float64 natural-log states; pixels that are not weighed are left.
  double* reference;
  double* mass;
  double* centre;
  double* logit_sum;

  int radius() const { return patch_size / 2; }
  int pixels() const { return height * width; }
};

// One edge or corner: where its pixels are, and its queries as operands of products.
struct BorderPiece {
  bool corner;
  // Pixel (i, d), i along the edge and d away from it, is origin + i * along + d * away.
  int origin, along, away;
  // The same in a plane of which d is the last coordinate: the image, or its transpose.
  bool transposed, reversed;
  int plane_origin, plane_along;
  int length, depth;    // of the strip, or the sides of the corner
  int places;           // of a patch along the edge
  int stride, bytes;    // of a strip's position and of a patch
  int rows, per_image;  // of a tile of patches; tiles
  std::size_t image_bytes;
  int chunks;  // of 64 bytes
  int lanes, groups;
  TileShapes shapes;
  std::vector<std::int32_t> pixel;  // of each lane, padded with the first of its group
  // Where a lane's norm and centre are in a row of the tables: groups start at table[group].
  std::vector<std::int32_t> table, index;
  Buffer<std::int8_t> queries;  // [group][chunk][high, low][word][lane * 4]
  std::vector<float> step;      // of each lane
  std::vector<double> power;    // scale * |w|^2

  // Whether a group's queries stay in their tiles, and the first of those.
  bool fits() const { return chunks <= 2; }
  int operands() const { return fits() ? 4 : 6; }
  int table_size(int radius) const {
    const int entries = corner ? radius * radius : radius;
    return (entries + kLanes - 1) / kLanes * kLanes;
  }
};

// What all threads share.
class BorderPlan {
 public:
  explicit BorderPlan(const Border& border)
      : border(border), scale(kLog2E / (2.0 * border.sigma * border.sigma)) {
    const int h = border.height, w = border.width;
    for (const bool far : {false, true}) {
      BorderPiece side{}, end{};
      side.origin = side.plane_origin = far ? w - 1 : 0;
      side.along = side.plane_along = w;
      side.away = far ? -1 : 1;
      side.reversed = far;
      side.length = h;
      add(std::move(side));
      end.transposed = true;
      end.origin = far ? (h - 1) * w : 0;
      end.plane_origin = far ? h - 1 : 0;
      end.along = 1;
      end.plane_along = h;
      end.away = far ? -w : w;
      end.reversed = far;
      end.length = w;
      add(std::move(end));
    }
    for (const bool bottom : {false, true}) {
      for (const bool right : {false, true}) {
        BorderPiece piece{};
        piece.corner = true;
        piece.origin = piece.plane_origin = (bottom ? (h - 1) * w : 0) + (right ? w - 1 : 0);
        piece.along = piece.plane_along = bottom ? -w : w;
        piece.away = right ? -1 : 1;
        piece.reversed = right;
        piece.length = 2 * border.radius();
        add(std::move(piece));
      }
    }
  }

  const Border& border;
  const double scale;
  std::vector<BorderPiece> pieces;
  bool transposes = false;

 private:
  // Completes a piece whose place is set, if any of its pixels is wanted.
  void add(BorderPiece&& piece) {
    const int r = border.radius(), c = border.channels;
    const bool corner = piece.corner;
    piece.depth = 2 * r;
    piece.places = corner ? 1 : piece.length - 2 * r;
    const int reach = corner ? 2 * r : border.patch_size;
    piece.bytes = reach * piece.depth * c;
    piece.chunks = (piece.bytes + kTileBytes - 1) / kTileBytes;
    if (corner) {
      piece.stride = piece.chunks * kTileBytes;
      piece.rows = kTileRows;
      piece.per_image = 1;
      piece.image_bytes = piece.stride;
    } else {
      piece.stride = piece.depth * c;
      const int tiles = (piece.places + kTileRows - 1) / kTileRows;
      piece.rows = (piece.places + tiles - 1) / tiles;
      piece.per_image = tiles;
      // The last tile may reach beyond the strip, and its last chunk beyond that.
      const int positions = piece.rows * tiles + border.patch_size - 1;
      piece.image_bytes = static_cast<std::size_t>(positions) * piece.stride + kTileBytes;
    }
    for (int tile = 0; tile < 8; ++tile) {
      piece.shapes.row_bytes[tile] = kTileBytes;
      piece.shapes.rows[tile] =
          static_cast<std::uint8_t>(tile < piece.operands() ? piece.rows : kTileRows);
    }
    // Of a corner's pixel both places count from the border; of an edge's the first is inside.
    const auto pixel_of = [&](int place, int offset) {
      return piece.origin + (corner ? place : place + r) * piece.along + offset * piece.away;
    };
    std::vector<int> chosen;  // place * r + offset
    for (int i = 0; i < (corner ? r : piece.places) * r; ++i) {
      if (border.wanted[pixel_of(i / r, i % r)]) chosen.push_back(i);
    }
    if (chosen.empty()) return;
    if (corner) {  // whose lanes are where its tables have them
      chosen.resize(r * r);
      std::iota(chosen.begin(), chosen.end(), 0);
    }
    piece.lanes = static_cast<int>(chosen.size());
    piece.groups = (piece.lanes + kLanes - 1) / kLanes;
    const int padded = piece.groups * kLanes;
    piece.pixel.resize(padded);
    piece.index.resize(padded);
    piece.table.resize(piece.groups);
    piece.step.resize(padded);
    piece.power.resize(padded);
    piece.queries.resize(static_cast<std::size_t>(padded) * piece.chunks * 2 * kTileBytes);
    std::vector<double> values(piece.bytes);
    for (int lane = 0; lane < padded; ++lane) {
      const int group = lane / kLanes;
      const int taken = lane < piece.lanes ? lane : group * kLanes;
      const int place = chosen[taken] / r, offset = chosen[taken] % r;
      piece.pixel[lane] = pixel_of(place, offset);
      piece.table[group] = corner ? group * kLanes : 0;
      piece.index[lane] = corner ? taken % kLanes : offset;
      const int start = corner ? 0 : place;
      for (int i = 0; i < reach; ++i) {
        const bool beyond = corner && i > place + r;
        for (int d = 0; d < piece.depth; ++d) {
          for (int channel = 0; channel < c; ++channel) {
            const int pixel = piece.origin + (start + i) * piece.along + d * piece.away;
            values[(i * c + channel) * piece.depth + d] =
                beyond || d > offset + r
                    ? 0.0
                    : static_cast<double>(border.x[channel * border.pixels() + pixel]) +
                          border.alpha;
          }
        }
      }
      round(piece, lane, values);
    }
    transposes = transposes || piece.transposed;
    pieces.push_back(std::move(piece));
  }

  // A query as high and low bytes of 16 bits; it is replaced by these rounded values.
  void round(BorderPiece& piece, int lane, const std::vector<double>& values) const {
    double largest = 1e-30;
    for (double value : values) largest = std::max(largest, std::abs(value));
    const double unit = largest / kLargestQuery;
    double power = 0.0;
    for (int b = 0; b < piece.bytes; ++b) {
      const int value = static_cast<int>(std::lrint(values[b] / unit));
      const Digits digits = digits_of(value);
      const std::size_t at =
          (static_cast<std::size_t>(lane / kLanes) * piece.chunks + b / kTileBytes) * 2 *
              kTileRows * kTileBytes +
          (b % kTileBytes / 4) * kTileBytes + lane % kLanes * 4 + b % 4;
      piece.queries[at] = digits.high;
      piece.queries[at + kTileRows * kTileBytes] = digits.low;
      power += (unit * value) * (unit * value);
    }
    piece.step[lane] = static_cast<float>(2.0 * scale * border.alpha / 127.5 * unit);
    piece.power[lane] = scale * power;
  }
};

// One thread's work: one group of images at a time.
template <int C>
class BorderWorker {
 public:
  explicit BorderWorker(const BorderPlan& plan) : plan_(plan), border_(plan.border) {
    std::size_t bytes = 0, entries = 0;
    const int r = border_.radius();
    for (const BorderPiece& piece : plan.pieces) {
      bytes = std::max(bytes, kImages * piece.image_bytes);
      entries = std::max(entries, static_cast<std::size_t>(kImages) * piece.rows * piece.per_image *
                                      piece.table_size(r));
      sums_.emplace_back(piece.groups * kFields);
    }
    strips_.resize(bytes + kTileBytes);
    squares_.resize(std::max(border_.height, border_.width));
    plane_stride_ = border_.pixels() + kTileBytes;
    planes_.resize(2 * kImages * C * plane_stride_ + kTileBytes);
    norm_scale_ = static_cast<float>(-plan.scale * border_.alpha * border_.alpha / (127.5 * 127.5));
    norms_.resize(entries);
    centres_.resize(entries * C);
  }

  BorderWorker(const BorderWorker&) = delete;
  BorderWorker& operator=(const BorderWorker&) = delete;
  ~BorderWorker() { release_tiles(); }

  void run(int group, const std::atomic<bool>& cancelled) {
    const std::int64_t begin = border_.starts[group], end = border_.starts[group + 1];
    const double candidates = static_cast<double>(end - begin) * border_.pixels();
    threshold_ = static_cast<float>(22.0 + std::log2(candidates + 1.0));
    for (auto& sums : sums_) {
      for (std::size_t i = 0; i < sums.size(); ++i) {
        sums[i] = splat(i % kFields == kReference ? kNothing : 0.0f);
      }
    }
    for (std::int64_t first = begin; first < end; first += kImages) {
      if (cancelled.load(std::memory_order_relaxed)) return;
      const int count = static_cast<int>(std::min<std::int64_t>(kImages, end - first));
      load_planes(border_.members + first, count);
      for (std::size_t i = 0; i < plan_.pieces.size(); ++i) {
        const BorderPiece& piece = plan_.pieces[i];
        pack(piece, count);
        load_shapes(piece.shapes);
        for (int lanes = 0; lanes < piece.groups; ++lanes) {
          weigh(piece, lanes, count, sums_[i].data() + lanes * kFields);
        }
      }
    }
    for (std::size_t i = 0; i < plan_.pieces.size(); ++i) write(group, plan_.pieces[i], sums_[i]);
  }

 private:
  static constexpr int kImages = kTileRows;  // of a block: those of a corner's tile
  static constexpr int kLow = 2 * kTileRows * kLanes;
  static constexpr int kReference = 0, kMass = 1, kLogitSum = 2, kCentre = 3, kFields = 3 + C;

  // The images of a block, each channel as it is and transposed; whole vectors can be read around.
  void load_planes(const std::int64_t* members, int count) {
    const int height = border_.height, width = border_.width, pixels = border_.pixels();
    for (int image = 0; image < count; ++image) {
      const std::uint8_t* from = border_.images + members[image] * C * pixels;
      for (int c = 0; c < C; ++c, from += pixels) {
        std::memcpy(plane(image, c, false), from, pixels);
        if (plan_.transposes) transpose(from, height, width, plane(image, c, true));
      }
    }
  }

  std::uint8_t* plane(int image, int channel, bool transposed) {
    const int number = (image * C + channel) * 2 + transposed;
    return planes_.data() + kTileBytes + static_cast<std::size_t>(number) * plane_stride_;
  }

  static void transpose(const std::uint8_t* from, int height, int width, std::uint8_t* to) {
    if (std::min(height, width) < 16) {
      for (int y = 0; y < height; ++y) {
        for (int x = 0; x < width; ++x) to[x * height + y] = from[y * width + x];
      }
      return;
    }
    for (int y = 0; y < height; y += 16) {
      const int top = std::min(y, height - 16);
      for (int x = 0; x < width; x += 16) {
        const int left = std::min(x, width - 16);
        transpose_16(from + top * width + left, width, to + left * height + top, height);
      }
    }
  }

  // Four times, rows i and i + 8 are interleaved: a row's number and a byte's place change roles.
  static void transpose_16(const std::uint8_t* from, int width, std::uint8_t* to, int height) {
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) {
      a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * width));
    }
    for (int step = 0; step < 4; ++step) {
      for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
      }
      std::copy_n(b, 16, a);
    }
    for (int i = 0; i < 16; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * height), a[i]);
  }

  // Strips of a block of images, and of each patch, by how far the query is from the border, what
  // its norm adds to exponents, and the clean centre.
  void pack(const BorderPiece& piece, int count) {
    const int r = border_.radius(), size = piece.table_size(r);
    const int rows = piece.corner ? 1 : piece.rows * piece.per_image;
    if (piece.corner && count < kImages) std::fill_n(norms_.data(), kImages * size, kNever);
    for (int image = 0; image < count; ++image) {
      std::uint8_t* const strip = strips_.data() + image * piece.image_bytes;
      copy(piece, image, strip);
      float* const norms = norms_.data() + static_cast<std::size_t>(image) * rows * size;
      float* const centres = centres_.data() + static_cast<std::size_t>(image) * rows * size * C;
      if (piece.corner) {
        corner_tables(strip, norms, centres, size);
      } else {
        edge_tables(piece, strip, norms, centres);
      }
    }
  }

  // Position after position, channel after channel. Values written beyond are overwritten later.
  void copy(const BorderPiece& piece, int image, std::uint8_t* strip) {
    const int depth = piece.depth;
    const __m128i backwards = _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const std::uint8_t* planes[C];
    for (int c = 0; c < C; ++c) planes[c] = plane(image, c, piece.transposed) + piece.plane_origin;
    for (int i = 0; i < piece.length; ++i) {
      for (int c = 0; c < C; ++c, strip += depth) {
        const std::uint8_t* const row = planes[c] + i * piece.plane_along;
        for (int d = 0; d < depth; d += 16) {
          const std::uint8_t* const from = piece.reversed ? row - d - 15 : row + d;
          __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
          if (piece.reversed) bytes = _mm_shuffle_epi8(bytes, backwards);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(strip + d), bytes);
        }
      }
    }
  }

  // By distance from the border.
  struct Depths {
    __m512i near = _mm512_setzero_si512(), far = _mm512_setzero_si512();
  };

  static __m512i squares(const std::uint8_t* bytes) {
    const __m512i wide =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return _mm512_madd_epi16(wide, wide);
  }

  // The squares of one position, all channels.
  Depths squares_at(const std::uint8_t* position) const {
    const int depth = 2 * border_.radius();
    Depths sums;
    for (int c = 0; c < C; ++c) {
      sums.near = _mm512_add_epi32(sums.near, squares(position + c * depth));
      if (depth > kLanes) {
        sums.far = _mm512_add_epi32(sums.far, squares(position + c * depth + kLanes));
      }
    }
    return sums;
  }

  static __m512i running_sums(__m512i values) {
    const __m512i zero = _mm512_setzero_si512();
    values = _mm512_add_epi32(values, _mm512_alignr_epi32(values, zero, 15));
    values = _mm512_add_epi32(values, _mm512_alignr_epi32(values, zero, 14));
    values = _mm512_add_epi32(values, _mm512_alignr_epi32(values, zero, 12));
    return _mm512_add_epi32(values, _mm512_alignr_epi32(values, zero, 8));
  }

  // What the norm of a patch with these squares adds to exponents, by the query's own distance o:
  // its patch ends at r + o.
  __m512 norms_of(const Depths& squares) const {
    const int r = border_.radius();
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(r));
    const __m512i near = running_sums(squares.near);
    __m512i far = _mm512_setzero_si512();
    if (2 * r > kLanes) {
      const __m512i last = _mm512_permutexvar_epi32(_mm512_set1_epi32(15), near);
      far = _mm512_add_epi32(running_sums(squares.far), last);
    }
    const __m512i norms = _mm512_permutex2var_epi32(near, at, far);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(norms), _mm512_set1_ps(norm_scale_));
  }

  void edge_tables(const BorderPiece& piece, const std::uint8_t* strip, float* norms,
                   float* centres) {
    const int r = border_.radius(), patch = border_.patch_size;
    Depths box;
    for (int i = 0; i < piece.length; ++i) {
      const Depths fresh = squares_at(strip + i * piece.stride);
      squares_[i] = fresh;
      box.near = _mm512_add_epi32(box.near, fresh.near);
      box.far = _mm512_add_epi32(box.far, fresh.far);
      const int place = i - patch + 1;
      if (place < 0) continue;
      _mm512_store_ps(norms + place * kLanes, norms_of(box));
      box.near = _mm512_sub_epi32(box.near, squares_[place].near);
      box.far = _mm512_sub_epi32(box.far, squares_[place].far);
      const std::uint8_t* const centre = strip + (place + r) * piece.stride;
      for (int c = 0; c < C; ++c) {
        const Vec levels = bytes_to_floats(centre + c * piece.depth);
        _mm512_store_ps(centres + (place * C + c) * kLanes, reinterpret_cast<__m512>(levels));
      }
    }
    const int rows = piece.rows * piece.per_image;
    std::fill(norms + piece.places * kLanes, norms + rows * kLanes, kNever);
  }

  void corner_tables(const std::uint8_t* corner, float* norms, float* centres, int size) const {
    const int r = border_.radius(), depth = 2 * r;
    const __mmask16 those = static_cast<__mmask16>((1u << r) - 1);
    Depths box;
    for (int i = 0; i < depth; ++i, corner += C * depth) {
      const Depths fresh = squares_at(corner);
      box.near = _mm512_add_epi32(box.near, fresh.near);
      box.far = _mm512_add_epi32(box.far, fresh.far);
      if (i >= r) {
        _mm512_mask_storeu_ps(norms + (i - r) * r, those, norms_of(box));
        continue;
      }
      for (int c = 0; c < C; ++c) {
        const Vec levels = bytes_to_floats(corner + c * depth);
        _mm512_mask_storeu_ps(centres + c * size + i * r, those, reinterpret_cast<__m512>(levels));
      }
    }
  }

  // All patches of the block for the queries of one group of lanes.
  void weigh(const BorderPiece& piece, int group, int count, Vec* sums) {
    const std::int8_t* const queries = piece.queries.data() + static_cast<std::size_t>(group) *
                                                                  piece.chunks * 2 * kTileRows *
                                                                  kTileBytes;
    const int tiles = piece.corner ? 1 : count * piece.per_image;
    const int size = piece.table_size(border_.radius());
    lanes_.step = load(piece.step.data() + group * kLanes);
    lanes_.index = _mm512_loadu_si512(piece.index.data() + group * kLanes);
    lanes_.size = size;
    lanes_.sums = sums;
    for (Vec& field : fresh_) field = Vec{};
    if (piece.fits()) {
      load_tile<4>(queries, kTileBytes);
      load_tile<5>(queries + kTileRows * kTileBytes, kTileBytes);
      if (piece.chunks == 2) {
        load_tile<6>(queries + 2 * kTileRows * kTileBytes, kTileBytes);
        load_tile<7>(queries + 3 * kTileRows * kTileBytes, kTileBytes);
      }
    }
    const auto strip = [&](int tile) {
      return strips_.data() + (tile / piece.per_image) * piece.image_bytes +
             (tile % piece.per_image) * piece.rows * piece.stride;
    };
    for (int tile = 0; tile < tiles; tile += 2) {
      const bool pair = tile + 1 < tiles;
      if (piece.fits()) {
        multiply_one(piece, strip(tile), products_);
        if (pair) multiply_one(piece, strip(tile + 1), products_ + piece.rows * kLanes);
      } else {
        multiply(piece, queries, strip(tile), strip(pair ? tile + 1 : tile));
      }
      const std::size_t row = static_cast<std::size_t>(tile) * piece.rows;
      add((1 + pair) * piece.rows, norms_.data() + row * size + piece.table[group],
          centres_.data() + row * size * C + piece.table[group]);
    }
    for (int field = kMass; field < kFields; ++field) sums[field] += fresh_[field];
  }

  // A tile of patches with queries that are in their tiles.
  void multiply_one(const BorderPiece& piece, const std::uint8_t* strip, std::int32_t* products) {
    clear_tile<0>();
    clear_tile<1>();
    load_tile<2>(strip, piece.stride);
    multiply_tiles<0, 2, 4>();
    multiply_tiles<1, 2, 5>();
    if (piece.chunks == 2) {
      load_tile<3>(strip + kTileBytes, piece.stride);
      multiply_tiles<0, 3, 6>();
      multiply_tiles<1, 3, 7>();
    }
    store_tile<0>(products, kTileBytes);
    store_tile<1>(products + kLow, kTileBytes);
  }

  // Two tiles of patches with the queries: high products of both, then low ones.
  void multiply(const BorderPiece& piece, const std::int8_t* queries, const std::uint8_t* first,
                const std::uint8_t* second) {
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
    for (int chunk = 0; chunk < piece.chunks; ++chunk) {
      const std::int8_t* const operands = queries + chunk * 2 * kTileRows * kTileBytes;
      load_tile<6>(operands, kTileBytes);
      load_tile<7>(operands + kTileRows * kTileBytes, kTileBytes);
      load_tile<4>(first + chunk * kTileBytes, piece.stride);
      load_tile<5>(second + chunk * kTileBytes, piece.stride);
      multiply_tiles<0, 4, 6>();
      multiply_tiles<1, 4, 7>();
      multiply_tiles<2, 5, 6>();
      multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(products_, kTileBytes);
    store_tile<1>(products_ + kLow, kTileBytes);
    store_tile<2>(products_ + piece.rows * kLanes, kTileBytes);
    store_tile<3>(products_ + kLow + piece.rows * kLanes, kTileBytes);
  }

  // Adds rows of products to the sums of the current lanes.
  void add(int rows, const float* norms, const float* centres) {
    constexpr int kTogether = 4;
    const __m512 step = reinterpret_cast<__m512>(lanes_.step);
    const __m512 big = _mm512_mul_ps(step, _mm512_set1_ps(256.0f));
    for (int row = 0; row < rows; row += kTogether) {
      Vec exponents[kTogether];
      Vec most = splat(kNever);
      for (int i = 0; i < kTogether; ++i) {
        const int at = std::min(row + i, rows - 1);
        const std::int32_t* const products = products_ + at * kLanes;
        const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(products));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(products + kLow));
        const __m512 rest = _mm512_fmadd_ps(low, step, entry(norms + at * lanes_.size));
        exponents[i] = reinterpret_cast<Vec>(_mm512_fmadd_ps(high, big, rest));
        most = max(most, exponents[i]);
      }
      Vec& reference = lanes_.sums[kReference];
      if (mask_less(reference - threshold_, most) == 0) continue;
      if (mask_less(reference + 8.0f, most) != 0) lower(max(reference, most));
      Vec below[kTogether], weights[kTogether];
      for (int i = 0; i < kTogether; ++i) {
        below[i] = row + i < rows ? exponents[i] - reference : splat(kNever);
      }
      exp2_nonpositive(below, weights);
      for (int i = 0; i < kTogether && row + i < rows; ++i) {
        fresh_[kMass] += weights[i];
        fresh_[kLogitSum] += weights[i] * below[i];
        for (int c = 0; c < C; ++c) {
          const float* const centre = centres + ((row + i) * C + c) * lanes_.size;
          fresh_[kCentre + c] += weights[i] * reinterpret_cast<Vec>(entry(centre));
        }
      }
    }
  }

  // Each lane's entry of a row of a table.
  __m512 entry(const float* row) const {
    return _mm512_permutexvar_ps(lanes_.index, _mm512_load_ps(row));
  }

  // Moves the current sums to nearer references.
  void lower(Vec reference) {
    const Vec shift[1] = {lanes_.sums[kReference] - reference};
    Vec factor[1];
    exp2_nonpositive(shift, factor);
    for (Vec* sums : {lanes_.sums, fresh_}) {
      sums[kLogitSum] = (sums[kLogitSum] + shift[0] * sums[kMass]) * factor[0];
      sums[kMass] *= factor[0];
      for (int c = 0; c < C; ++c) sums[kCentre + c] *= factor[0];
    }
    lanes_.sums[kReference] = reference;
  }

  void write(int group, const BorderPiece& piece, const std::vector<Vec>& sums) const {
    const std::size_t pixels = border_.pixels();
    for (int lane = 0; lane < piece.lanes; ++lane) {
      const Vec* const of = sums.data() + lane / kLanes * kFields;
      const int i = lane % kLanes;
      const std::size_t at = group * pixels + piece.pixel[lane];
      border_.reference[at] = kLn2 * (static_cast<double>(of[kReference][i]) - piece.power[lane]);
      border_.mass[at] = of[kMass][i];
      border_.logit_sum[at] = kLn2 * static_cast<double>(of[kLogitSum][i]);
      for (int c = 0; c < C; ++c) {
        border_.centre[(group * C + c) * pixels + piece.pixel[lane]] =
            static_cast<double>(of[kCentre + c][i]) / 127.5 - static_cast<double>(of[kMass][i]);
      }
    }
  }

  struct Lanes {
    Vec step;
    __m512i index;
    int size;
    Vec* sums;
  };

  const BorderPlan& plan_;
  const Border& border_;
  float threshold_ = 0.0f;
  Buffer<std::uint8_t> strips_;    // of a block of images, one after the other
  Buffer<float> norms_, centres_;  // [image][row][table] and [image][row][C][table]
  Buffer<Depths> squares_;         // of every position of a strip
  Buffer<std::uint8_t> planes_;    // [image][channel][as it is, transposed]
  std::size_t plane_stride_;
  float norm_scale_;
  std::vector<std::vector<Vec>> sums_;
  Lanes lanes_;
  Vec fresh_[kFields];  // of the current block, so that long sums lose no digits
  alignas(64) std::int32_t products_[2 * kLow];
};

}  // namespace els
#endif
