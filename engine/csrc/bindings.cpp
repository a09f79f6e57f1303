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

// Read-only data, also of memory maps.
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
          std::atomic<std::int64_t>& next, std::atomic<std::int64_t>& done,
          std::atomic<bool>& cancelled) {
  els::flush_denormals();
  els::Worker<C> worker(problem, sweeps);
  const std::int64_t tasks = static_cast<std::int64_t>(problem.groups) * problem.batch;
  for (;;) {
    const std::int64_t task = next.fetch_add(1);
    if (task >= tasks || cancelled.load()) return;
    worker.run(static_cast<int>(task % problem.groups), static_cast<int>(task / problem.groups),
               cancelled);
    done.fetch_add(1);
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

// Checks that images and a query have the same C, H and W.
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

// Checks that the groups, members starts[g] to starts[g + 1], cover all members.
void check_starts(const Array<std::int64_t>& starts, const Array<std::int64_t>& members) {
  const py::ssize_t groups = starts.size() - 1;
  if (groups < 1 || starts.data()[0] != 0 || starts.data()[groups] != members.size() ||
      !std::is_sorted(starts.data(), starts.data() + groups + 1)) {
    throw std::invalid_argument("starts must ascend from 0 to the number of members");
  }
}

void run(const els::Problem& problem, int threads, const py::object& progress) {
  const std::vector<els::Sweep> sweeps = els::plan_sweeps(problem);
  std::atomic<std::int64_t> next{0}, done{0};
  const std::int64_t tasks = static_cast<std::int64_t>(problem.groups) * problem.batch;
  els::on_threads(
      threads, tasks,
      [&](std::atomic<bool>& cancelled) {
        with_channels(problem.channels, [&](auto channels) {
          work<channels>(problem, sweeps, next, done, cancelled);
        });
      },
      [&] { progress(done.load()); });
}

void weigh(Array<std::uint8_t> images, Array<double> x, Array<double> alpha, Array<double> sigma,
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
  els::Candidates problem{};
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
      els::weigh_candidates(problem, task / pixels, static_cast<int>(task % pixels), patch, sums);
    }
  });
}

void posterior(Array<std::uint8_t> images, Array<std::int64_t> members, Array<std::int64_t> starts,
               Array<double> x, Array<double> alpha, Array<double> sigma, int patch_size,
               bool equivariant, bool circular, bool border_only, int threads,
               Array<double> reference, Array<double> mass, Array<double> centre,
               std::optional<Array<double>> logit_sum, std::optional<Array<double>> top_logits,
               std::optional<Array<std::int64_t>> top_addresses, py::object progress) {
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
  problem.reference = checked(reference, {groups, batch, height, width}, "reference");
  problem.mass = checked(mass, {groups, batch, height, width}, "mass");
  problem.centre = checked(centre, {groups, batch, channels, height, width}, "centre");
  if (logit_sum)
    problem.logit_sum = checked(*logit_sum, {groups, batch, height, width}, "logit_sum");
  if (top_logits && top_addresses) {
    problem.top = static_cast<int>(top_logits->shape(top_logits->ndim() - 1));
    const std::vector<py::ssize_t> shape{groups, batch, height, width, problem.top};
    problem.top_logits = checked(*top_logits, shape, "top_logits");
    problem.top_addresses = checked(*top_addresses, shape, "top_addresses");
  }
  run(problem, threads, progress);
}

template <int C, bool kNoisy, typename Products>
void sample_parts(els::ListPlan& plan, const std::vector<std::int64_t>& bounds,
                  std::atomic<std::int64_t>& next, const std::atomic<bool>& cancelled) {
  els::flush_denormals();
  els::ListReader<C, kNoisy, Products> reader(plan);
  for (;;) {
    const std::int64_t part = next.fetch_add(1);
    if (part >= plan.sample.parts || cancelled.load()) return;
    reader.run(static_cast<int>(part), bounds[part], bounds[part + 1], cancelled);
  }
}

template <int C, bool kNoisy>
void sample_with(els::ListPlan& plan, const std::vector<std::int64_t>& bounds,
                 std::atomic<std::int64_t>& next, const std::atomic<bool>& cancelled) {
#if defined(ELS_HAS_TILES)
  if (plan.sample.tiles) {
    return sample_parts<C, kNoisy, els::TileProducts>(plan, bounds, next, cancelled);
  }
#endif
  sample_parts<C, kNoisy, els::IntegerProducts>(plan, bounds, next, cancelled);
}

template <int C>
void sample_channels(els::ListPlan& plan, const std::vector<std::int64_t>& bounds,
                     std::atomic<std::int64_t>& next, const std::atomic<bool>& cancelled) {
  if (plan.sample.noise != nullptr) return sample_with<C, true>(plan, bounds, next, cancelled);
  sample_with<C, false>(plan, bounds, next, cancelled);
}

void run_lists(const els::ListSample& sample, int threads) {
  els::ListPlan plan(sample);
  // Parts of about equal work: codes, and a constant for each list.
  constexpr std::int64_t kListCodes = 256;
  const std::int64_t last = sample.lists - 1;
  const std::int64_t all = sample.offsets[last] + sample.sizes[last] + kListCodes * sample.lists;
  std::vector<std::int64_t> bounds(sample.parts + 1, sample.lists);
  std::int64_t list = 0;
  for (int part = 0; part < sample.parts; ++part) {
    while (list < sample.lists &&
           sample.offsets[list] + kListCodes * list < all / sample.parts * part) {
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
  deal(sample.lists, 64, [&](std::int64_t a, std::int64_t b) { plan.rank(a, b); });
  // As many queries as keep the counts in the first-level cache.
  deal(sample.queries, 32, [&](std::int64_t a, std::int64_t b) {
    plan.spend(static_cast<int>(a), static_cast<int>(b));
  });
  std::atomic<std::int64_t> next{0};
  els::on_threads(threads, sample.parts, [&](std::atomic<bool>& cancelled) {
    with_channels(sample.channels,
                  [&](auto channels) { sample_channels<channels>(plan, bounds, next, cancelled); });
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

void sample_lists(Array<std::uint8_t> data, Array<std::int64_t> sizes, Array<std::int64_t> offsets,
                  Array<float> centroids, Array<float> norms, Array<std::uint8_t> centres,
                  Array<float> unit, Array<float> zero, bool residual,
                  std::optional<Array<float>> noise, std::optional<Array<std::uint8_t>> allowed,
                  std::int64_t pixels, Array<float> y, double precision, double blur,
                  Array<double> budget, std::int64_t most_read, int coarsest, std::uint64_t seed,
                  bool tiles, int threads, Array<double> results) {
  if (centroids.ndim() != 2 || centres.ndim() != 2 || y.ndim() != 2 || results.ndim() != 3) {
    throw std::invalid_argument("centroids, centres and y must have 2 dimensions, results 3");
  }
  const py::ssize_t lists = centroids.shape(0), size = centroids.shape(1), queries = y.shape(0),
                    count = centres.shape(0), channels = centres.shape(1);
  if (lists < 1 || size < 1 || queries < 1) throw std::invalid_argument("nothing to sample");
  if (coarsest < 0 || coarsest >= els::kMostLevels) {
    throw std::invalid_argument("coarsest must be 0 to 15");
  }
  if (tiles && !can_use_tiles()) throw std::invalid_argument("there is no matrix unit");
  els::ListSample sample{};
  sample.lists = lists;
  sample.data = constant(data, {count * (size + els::kIdBytes)}, "data");
  sample.sizes = constant(sizes, {lists}, "sizes");
  sample.offsets = constant(offsets, {lists}, "offsets");
  std::int64_t codes_before = 0;
  for (py::ssize_t list = 0; list < lists; ++list) {
    if (sample.offsets[list] != codes_before || sample.sizes[list] < 0 ||
        sample.sizes[list] > count - codes_before) {
      throw std::invalid_argument("the lists' sizes and offsets differ");
    }
    codes_before += sample.sizes[list];
  }
  if (codes_before != count) throw std::invalid_argument("the lists' sizes and centres differ");
  sample.code_size = static_cast<int>(size);
  sample.centroids = centroids.data();
  sample.norms = constant(norms, {count}, "norms");
  sample.centres = centres.data();
  sample.channels = static_cast<int>(channels);
  sample.unit = constant(unit, {size}, "unit");
  sample.zero = constant(zero, {size}, "zero");
  sample.residual = residual;
  sample.noise = noise ? constant(*noise, {lists}, "noise") : nullptr;
  if (pixels < 1) throw std::invalid_argument("pixels must be at least 1");
  if (allowed) {
    sample.images = allowed->size();
    sample.allowed = constant(*allowed, {allowed->size()}, "allowed");
  }
  sample.pixels = pixels;
  sample.y = constant(y, {queries, size}, "y");
  sample.queries = static_cast<int>(queries);
  sample.precision = precision;
  sample.blur = blur;
  sample.budget = constant(budget, {queries}, "budget");
  sample.most_read = most_read;
  sample.coarsest = coarsest;
  sample.seed = seed;
  sample.tiles = tiles;
  sample.parts = static_cast<int>(results.shape(0));
  sample.results = checked(results, {results.shape(0), sample.fields(), queries}, "results");
  run_lists(sample, threads);
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
            int threads, Array<double> reference, Array<double> mass, Array<double> centre,
            Array<double> logit_sum) {
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
  problem.reference = checked(reference, {groups, height, width}, "reference");
  problem.mass = checked(mass, {groups, height, width}, "mass");
  problem.centre = checked(centre, {groups, channels, height, width}, "centre");
  problem.logit_sum = checked(logit_sum, {groups, height, width}, "logit_sum");
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
             py::arg("reference").noconvert(), py::arg("mass").noconvert(),
             py::arg("centre").noconvert(), py::arg("logit_sum").noconvert(),
             py::arg("top_logits").noconvert(), py::arg("top_addresses").noconvert(),
             py::arg("progress"));
  module.def("weigh", &weigh, py::arg("images").noconvert(), py::arg("x").noconvert(),
             py::arg("alpha").noconvert(), py::arg("sigma").noconvert(), py::arg("patch_size"),
             py::arg("circular"), py::arg("threads"), py::arg("addresses").noconvert(),
             py::arg("logits").noconvert(), py::arg("centres").noconvert());
  module.def("sample_lists", &sample_lists, py::arg("data").noconvert(),
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
             py::arg("reference").noconvert(), py::arg("mass").noconvert(),
             py::arg("centre").noconvert(), py::arg("logit_sum").noconvert());
#endif
  module.def("can_use_tiles", &can_use_tiles);
  module.def("instruction_sets", &instruction_sets);
}
