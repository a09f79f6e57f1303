// The Python module of one instruction set: layout checks, threads, interruption.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "border.h"
#include "candidates.h"
#include "exact.h"
#include "lists.h"
#include "threads.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// What is only read: memory maps are.
template <typename T>
const T* constant(const Array<T>& array, std::vector<py::ssize_t> shape, const char* name) {
  if (std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) != shape) {
    throw std::invalid_argument(std::string(name) + " has the wrong shape");
  }
  return array.data();
}

template <typename T>
T* checked(Array<T>& array, std::vector<py::ssize_t> shape, const char* name) {
  constant(array, shape, name);
  return array.mutable_data();
}

// Deals tasks to threads. Which thread takes a task does not matter to its result.
template <int C>
void work(const els::Problem& problem, const std::vector<els::Sweep>& sweeps,
          std::atomic<std::int64_t>& next, std::atomic<bool>& cancelled) {
  els::flush_denormals();
  els::Worker<C> worker(problem, sweeps);
  const std::int64_t tasks = static_cast<std::int64_t>(problem.groups) * problem.batch;
  for (;;) {
    const std::int64_t task = next.fetch_add(1);
    if (task >= tasks || cancelled.load()) return;
    worker.run(static_cast<int>(task % problem.groups), static_cast<int>(task / problem.groups),
               cancelled);
  }
}

// Calls `body` with the number of channels as a constant.
template <typename Body>
void with_channels(int channels, const Body& body) {
  switch (channels) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
  }
  throw std::invalid_argument("images must have 1 to 4 channels");
}

// That images and a query, whose last three dimensions are C, H, W, belong together.
void check_images(const Array<std::uint8_t>& images, py::ssize_t channels, py::ssize_t height,
                  py::ssize_t width) {
  if (images.shape(1) != channels || images.shape(2) != height || images.shape(3) != width) {
    throw std::invalid_argument("images and x differ in shape");
  }
}

void check_members(const Array<std::int64_t>& members, const Array<std::uint8_t>& images) {
  for (py::ssize_t i = 0; i < members.size(); ++i) {
    if (members.data()[i] < 0 || members.data()[i] >= images.shape(0)) {
      throw std::invalid_argument("members names an image that is not there");
    }
  }
}

// That groups of members, from starts[g] to starts[g + 1], are all of them.
void check_starts(const Array<std::int64_t>& starts, const Array<std::int64_t>& members) {
  const py::ssize_t groups = starts.size() - 1;
  if (groups < 1 || starts.data()[0] != 0 || starts.data()[groups] != members.size() ||
      !std::is_sorted(starts.data(), starts.data() + groups + 1)) {
    throw std::invalid_argument("starts must ascend from 0 to the number of members");
  }
}

void run(const els::Problem& problem, int threads) {
  const std::vector<els::Sweep> sweeps = els::plan_sweeps(problem);
  std::atomic<std::int64_t> next{0};
  const std::int64_t tasks = static_cast<std::int64_t>(problem.groups) * problem.batch;
  els::on_threads(threads, tasks, [&](std::atomic<bool>& cancelled) {
    with_channels(problem.channels,
                  [&](auto channels) { work<channels>(problem, sweeps, next, cancelled); });
  });
}

void given(Array<std::uint8_t> images, Array<double> x, Array<double> alpha, Array<double> sigma,
           int patch_size, bool circular, int threads, Array<std::int64_t> addresses,
           Array<double> logits, Array<std::uint8_t> centres) {
  if (images.ndim() != 4 || x.ndim() != 4 || addresses.ndim() != 3) {
    throw std::invalid_argument("images and x must have 4 dimensions, addresses 3");
  }
  const py::ssize_t batch = x.shape(0), channels = x.shape(1), height = x.shape(2),
                    width = x.shape(3), candidates = addresses.shape(2);
  check_images(images, channels, height, width);
  if (patch_size < 1 || patch_size % 2 == 0 || patch_size > std::min(height, width)) {
    throw std::invalid_argument("patch_size must be odd, 1 to the image's shorter side");
  }
  const std::int64_t pixels = height * width, stop = images.shape(0) * pixels;
  els::GivenProblem problem{};
  problem.images = images.data();
  problem.x = x.data();
  problem.alpha = checked(alpha, {batch}, "alpha");
  problem.sigma = checked(sigma, {batch}, "sigma");
  problem.batch = static_cast<int>(batch);
  problem.channels = static_cast<int>(channels);
  problem.height = static_cast<int>(height);
  problem.width = static_cast<int>(width);
  problem.patch_size = patch_size;
  problem.circular = circular;
  problem.addresses = checked(addresses, {batch, pixels, candidates}, "addresses");
  problem.candidates = candidates;
  problem.logits = checked(logits, {batch, pixels, candidates}, "logits");
  problem.centres = checked(centres, {batch, pixels, candidates, channels}, "centres");
  for (py::ssize_t i = 0; i < addresses.size(); ++i) {
    if (problem.addresses[i] >= stop) {
      throw std::invalid_argument("addresses names a pixel that is not there");
    }
  }
  std::atomic<std::int64_t> next{0};
  els::on_threads(threads, batch * pixels, [&](std::atomic<bool>& cancelled) {
    std::vector<double> patch(channels * patch_size * patch_size), sums(patch_size);
    for (;;) {
      const std::int64_t task = next.fetch_add(1);
      if (task >= batch * pixels || cancelled.load()) return;
      els::weigh_given(problem, task / pixels, static_cast<int>(task % pixels), patch, sums);
    }
  });
}

void posterior(Array<std::uint8_t> images, Array<std::int64_t> members, Array<std::int64_t> starts,
               Array<double> x, Array<double> alpha, Array<double> sigma, int patch_size,
               bool equivariant, bool circular, bool border_only, int threads,
               Array<double> maximum, Array<double> mass, Array<double> centre,
               std::optional<Array<double>> tilt, std::optional<Array<double>> top_logits,
               std::optional<Array<std::int64_t>> top_addresses) {
  if (images.ndim() != 4 || x.ndim() != 4 || members.ndim() != 1 || starts.ndim() != 1) {
    throw std::invalid_argument("images and x must have 4 dimensions, members and starts 1");
  }
  const py::ssize_t groups = starts.size() - 1, batch = x.shape(0), channels = x.shape(1),
                    height = x.shape(2), width = x.shape(3);
  check_images(images, channels, height, width);
  if (patch_size < 1 || patch_size % 2 == 0 || patch_size > std::min(height, width)) {
    throw std::invalid_argument("patch_size must be odd, 1 to the image's shorter side");
  }
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  check_members(members, images);
  check_starts(starts, members);
  els::Problem problem{};
  problem.images = images.data();
  problem.members = members.data();
  problem.starts = starts.data();
  problem.channels = static_cast<int>(channels);
  problem.height = static_cast<int>(height);
  problem.width = static_cast<int>(width);
  problem.x = x.data();
  problem.alpha = checked(alpha, {batch}, "alpha");
  problem.sigma = checked(sigma, {batch}, "sigma");
  problem.batch = static_cast<int>(batch);
  problem.patch_size = patch_size;
  problem.equivariant = equivariant;
  problem.circular = circular;
  problem.border_only = border_only;
  problem.groups = static_cast<int>(groups);
  problem.maximum = checked(maximum, {groups, batch, height, width}, "maximum");
  problem.mass = checked(mass, {groups, batch, height, width}, "mass");
  problem.centre = checked(centre, {groups, batch, channels, height, width}, "centre");
  if (tilt) problem.tilt = checked(*tilt, {groups, batch, height, width}, "tilt");
  if (top_logits && top_addresses) {
    problem.top = static_cast<int>(top_logits->shape(top_logits->ndim() - 1));
    const std::vector<py::ssize_t> shape{groups, batch, height, width, problem.top};
    problem.top_logits = checked(*top_logits, shape, "top_logits");
    problem.top_addresses = checked(*top_addresses, shape, "top_addresses");
  }
  run(problem, threads);
}

template <int C, bool kNoisy, typename Products>
void scan_parts(els::ScanPlan& plan, const std::vector<std::int64_t>& bounds,
                std::atomic<std::int64_t>& next, const std::atomic<bool>& cancelled) {
  els::flush_denormals();
  els::Scanner<C, kNoisy, Products> scanner(plan);
  for (;;) {
    const std::int64_t part = next.fetch_add(1);
    if (part >= plan.scan.parts || cancelled.load()) return;
    scanner.run(static_cast<int>(part), bounds[part], bounds[part + 1], cancelled);
  }
}

template <int C, bool kNoisy>
void scan_with(els::ScanPlan& plan, const std::vector<std::int64_t>& bounds,
               std::atomic<std::int64_t>& next, const std::atomic<bool>& cancelled) {
#if defined(ELS_HAS_TILES)
  if (plan.scan.tiles) {
    return scan_parts<C, kNoisy, els::TileProducts>(plan, bounds, next, cancelled);
  }
#endif
  scan_parts<C, kNoisy, els::FloatProducts>(plan, bounds, next, cancelled);
}

template <int C>
void scan_channels(els::ScanPlan& plan, const std::vector<std::int64_t>& bounds,
                   std::atomic<std::int64_t>& next, const std::atomic<bool>& cancelled) {
  if (plan.scan.noise != nullptr) return scan_with<C, true>(plan, bounds, next, cancelled);
  scan_with<C, false>(plan, bounds, next, cancelled);
}

void run_scan(const els::Scan& scan, int threads) {
  els::ScanPlan plan(scan);
  // Parts of about as many codes, a list counting as some, too.
  constexpr std::int64_t kListCodes = 256;
  const std::int64_t last = scan.lists - 1;
  const std::int64_t all = scan.offsets[last] + scan.sizes[last] + kListCodes * scan.lists;
  std::vector<std::int64_t> bounds(scan.parts + 1, scan.lists);
  std::int64_t list = 0;
  for (int part = 0; part < scan.parts; ++part) {
    while (list < scan.lists && scan.offsets[list] + kListCodes * list < all / scan.parts * part) {
      ++list;
    }
    bounds[part] = list;
  }
  bounds[0] = 0;
  const auto deal = [&](std::int64_t count, std::int64_t step, const auto& work) {
    std::atomic<std::int64_t> next{0};
    els::on_threads(threads, (count + step - 1) / step, [&](std::atomic<bool>& cancelled) {
      for (;;) {
        const std::int64_t first = next.fetch_add(step);
        if (first >= count || cancelled.load()) return;
        work(first, std::min(first + step, count));
      }
    });
  };
  deal(scan.lists, 64, [&](std::int64_t a, std::int64_t b) { plan.rank(a, b); });
  // So many that what is counted stays in the first cache.
  deal(scan.queries, 32, [&](std::int64_t a, std::int64_t b) {
    plan.spend(static_cast<int>(a), static_cast<int>(b));
  });
  std::atomic<std::int64_t> next{0};
  els::on_threads(threads, scan.parts, [&](std::atomic<bool>& cancelled) {
    with_channels(scan.channels,
                  [&](auto channels) { scan_channels<channels>(plan, bounds, next, cancelled); });
  });
}

bool can_use_tiles() {
#if defined(ELS_HAS_TILES)
  static const bool can = els::can_use_tiles();
  return can;
#else
  return false;
#endif
}

void scan(Array<std::uint64_t> codes, Array<std::uint64_t> ids, Array<std::int64_t> sizes,
          Array<std::int64_t> offsets, Array<float> centroids, Array<float> norms,
          Array<std::uint8_t> centres, Array<float> unit, Array<float> zero, bool residual,
          std::optional<Array<float>> noise, std::optional<Array<std::uint8_t>> allowed,
          std::int64_t pixels, Array<float> y, double precision, double blur, Array<double> budget,
          std::int64_t most_read, int coarsest, std::uint64_t seed, bool tiles, int threads,
          Array<double> results) {
  if (centroids.ndim() != 2 || centres.ndim() != 2 || y.ndim() != 2 || results.ndim() != 3) {
    throw std::invalid_argument("centroids, centres and y must have 2 dimensions, results 3");
  }
  const py::ssize_t lists = centroids.shape(0), size = centroids.shape(1), queries = y.shape(0),
                    count = centres.shape(0), channels = centres.shape(1);
  if (lists < 1 || size < 1 || queries < 1) throw std::invalid_argument("nothing to scan");
  if (coarsest < 0 || coarsest >= els::kMostLevels) {
    throw std::invalid_argument("coarsest must be 0 to 15");
  }
  if (tiles && !can_use_tiles()) throw std::invalid_argument("there is no matrix unit");
  els::Scan scan{};
  scan.lists = lists;
  scan.codes = constant(codes, {lists}, "codes");
  scan.ids = constant(ids, {lists}, "ids");
  scan.sizes = constant(sizes, {lists}, "sizes");
  scan.offsets = constant(offsets, {lists}, "offsets");
  std::int64_t codes_before = 0;
  for (py::ssize_t list = 0; list < lists; ++list) {
    if (scan.offsets[list] != codes_before || scan.sizes[list] < 0 ||
        scan.sizes[list] > count - codes_before) {
      throw std::invalid_argument("the lists' sizes and offsets differ");
    }
    codes_before += scan.sizes[list];
  }
  if (codes_before != count) throw std::invalid_argument("the lists' sizes and centres differ");
  scan.code_size = static_cast<int>(size);
  scan.centroids = centroids.data();
  scan.norms = constant(norms, {count}, "norms");
  scan.centres = centres.data();
  scan.channels = static_cast<int>(channels);
  scan.unit = constant(unit, {size}, "unit");
  scan.zero = constant(zero, {size}, "zero");
  scan.residual = residual;
  scan.noise = noise ? constant(*noise, {lists}, "noise") : nullptr;
  if (pixels < 1) throw std::invalid_argument("pixels must be at least 1");
  if (allowed) {
    scan.images = allowed->size();
    scan.allowed = constant(*allowed, {allowed->size()}, "allowed");
  }
  scan.pixels = pixels;
  scan.y = constant(y, {queries, size}, "y");
  scan.queries = static_cast<int>(queries);
  scan.precision = precision;
  scan.blur = blur;
  scan.budget = constant(budget, {queries}, "budget");
  scan.most_read = most_read;
  scan.coarsest = coarsest;
  scan.seed = seed;
  scan.tiles = tiles;
  scan.parts = static_cast<int>(results.shape(0));
  scan.results = checked(results, {results.shape(0), scan.fields(), queries}, "results");
  run_scan(scan, threads);
}

#if defined(ELS_HAS_TILES)
template <int C>
void work_on_border(const els::BorderPlan& plan, std::atomic<std::int64_t>& next,
                    const std::atomic<bool>& cancelled) {
  els::flush_denormals();
  els::BorderWorker<C> worker(plan);
  for (;;) {
    const std::int64_t group = next.fetch_add(1);
    if (group >= plan.border.groups || cancelled.load()) return;
    worker.run(static_cast<int>(group), cancelled);
  }
}

void run_border(const els::Border& border, int threads) {
  const els::BorderPlan plan(border);
  std::atomic<std::int64_t> next{0};
  els::on_threads(threads, border.groups, [&](std::atomic<bool>& cancelled) {
    with_channels(border.channels,
                  [&](auto channels) { work_on_border<channels>(plan, next, cancelled); });
  });
}

void border(Array<std::uint8_t> images, Array<std::int64_t> members, Array<std::int64_t> starts,
            Array<float> x, Array<std::uint8_t> wanted, double alpha, double sigma, int patch_size,
            int threads, Array<double> maximum, Array<double> mass, Array<double> centre,
            Array<double> tilt) {
  if (images.ndim() != 4 || x.ndim() != 3 || members.ndim() != 1 || starts.ndim() != 1) {
    throw std::invalid_argument("images must have 4 dimensions, x 3, members and starts 1");
  }
  const py::ssize_t groups = starts.size() - 1, channels = x.shape(0), height = x.shape(1),
                    width = x.shape(2);
  check_images(images, channels, height, width);
  if (patch_size < 3 || patch_size % 2 == 0 || patch_size > std::min(height, width) ||
      patch_size / 2 > els::kMostBorder) {
    throw std::invalid_argument("patch_size must be odd, 3 to the image's shorter side or 33");
  }
  if (!can_use_tiles()) throw std::invalid_argument("there is no matrix unit");
  check_starts(starts, members);
  check_members(members, images);
  els::Border problem{};
  problem.images = images.data();
  problem.members = members.data();
  problem.starts = starts.data();
  problem.groups = static_cast<int>(groups);
  problem.channels = static_cast<int>(channels);
  problem.height = static_cast<int>(height);
  problem.width = static_cast<int>(width);
  problem.x = x.data();
  problem.wanted = constant(wanted, {height, width}, "wanted");
  problem.alpha = alpha;
  problem.sigma = sigma;
  problem.patch_size = patch_size;
  problem.maximum = checked(maximum, {groups, height, width}, "maximum");
  problem.mass = checked(mass, {groups, height, width}, "mass");
  problem.centre = checked(centre, {groups, channels, height, width}, "centre");
  problem.tilt = checked(tilt, {groups, height, width}, "tilt");
  run_border(problem, threads);
}
#endif

// The sets this processor can run, worst first. Asked of the baseline module only: merely loading
// another could already execute an instruction that is not there.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets{"baseline"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back("avx512");
  }
#endif
  return sets;
}

}  // namespace

PYBIND11_MODULE(ELS_MODULE, module) {
  module.attr("LANES") = els::kLanes;
  module.def("posterior", &posterior, py::arg("images").noconvert(), py::arg("members").noconvert(),
             py::arg("starts").noconvert(), py::arg("x").noconvert(), py::arg("alpha").noconvert(),
             py::arg("sigma").noconvert(), py::arg("patch_size"), py::arg("equivariant"),
             py::arg("circular"), py::arg("border_only"), py::arg("threads"),
             py::arg("maximum").noconvert(), py::arg("mass").noconvert(),
             py::arg("centre").noconvert(), py::arg("tilt").noconvert(),
             py::arg("top_logits").noconvert(), py::arg("top_addresses").noconvert());
  module.def("given", &given, py::arg("images").noconvert(), py::arg("x").noconvert(),
             py::arg("alpha").noconvert(), py::arg("sigma").noconvert(), py::arg("patch_size"),
             py::arg("circular"), py::arg("threads"), py::arg("addresses").noconvert(),
             py::arg("logits").noconvert(), py::arg("centres").noconvert());
  module.def("scan", &scan, py::arg("codes").noconvert(), py::arg("ids").noconvert(),
             py::arg("sizes").noconvert(), py::arg("offsets").noconvert(),
             py::arg("centroids").noconvert(), py::arg("norms").noconvert(),
             py::arg("centres").noconvert(), py::arg("unit").noconvert(),
             py::arg("zero").noconvert(), py::arg("residual"), py::arg("noise").noconvert(),
             py::arg("allowed").noconvert(), py::arg("pixels"), py::arg("y").noconvert(),
             py::arg("precision"), py::arg("blur"), py::arg("budget").noconvert(),
             py::arg("most_read"), py::arg("coarsest"), py::arg("seed"), py::arg("tiles"),
             py::arg("threads"), py::arg("results").noconvert());
#if defined(ELS_HAS_TILES)
  module.def("border", &border, py::arg("images").noconvert(), py::arg("members").noconvert(),
             py::arg("starts").noconvert(), py::arg("x").noconvert(), py::arg("wanted").noconvert(),
             py::arg("alpha"), py::arg("sigma"), py::arg("patch_size"), py::arg("threads"),
             py::arg("maximum").noconvert(), py::arg("mass").noconvert(),
             py::arg("centre").noconvert(), py::arg("tilt").noconvert());
#endif
  module.def("can_use_tiles", &can_use_tiles);
  module.def("instruction_sets", &instruction_sets);
}
