#include "paths.h"

#include <algorithm>
#include <set>

#include "cpu_features.h"
#include "dispatch.h"
#include "reference.h"

namespace torch_ext::test {

#if defined(__x86_64__)
extern const GemmKernel kEmulatedVnni;  // emulated_vnni.cpp
#endif

namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kBF16};
constexpr const char* kUses[] = {"gemm", "gemm random", "attention f32", "attention bf16"};

std::set<std::string>& covered() {
  static std::set<std::string> paths;
  return paths;
}

bool runs_here(uint32_t required) { return (cpu_features() & required) == required; }

std::string packer_path(const GemmPath& path, Packer p, DType t) {
  return path.name() + ": " + packer_name(p) + "_" + dtype_name(t);
}

std::string use_path(const GemmPath& path, const char* use) { return path.name() + ": " + use; }

std::string store_path(const VecKernels& vec, Activation a, DType out, const char* residual) {
  return std::string(vec.name) + ": store_tile " + activation_name(a) + ", out " + dtype_name(out) + ", residual " +
         residual;
}

std::string row_path(const VecKernels& vec, const char* function, const char* type = "") {
  return std::string(vec.name) + ": " + function + (*type ? " " : "") + type;
}

std::string gate_path(const VecKernels& vec, Activation a, DType t) {
  return std::string(vec.name) + ": gate_row " + activation_name(a) + " " + dtype_name(t);
}

std::vector<std::string> paths_of(const GemmPath& path) {
  std::vector<std::string> names;
  for (const Packer p : kPackers) {
    for (const DType t : kTypes) names.push_back(packer_path(path, p, t));
  }
  for (size_t i = 0; i < path.kernel->ukernel_count; ++i) names.emplace_back(path.kernel->ukernels[i].name);
  for (const char* const use : kUses) names.push_back(use_path(path, use));
  if (path.kernel->softmax_pack) names.push_back(path.name() + ": softmax_pack");
  if (path.kernel->wide) names.push_back(use_path(path, "gemm wide"));
  if (path.kernel->strassen_winograd) names.push_back(use_path(path, "gemm strassen winograd"));
  return names;
}

std::vector<std::string> s8_paths_of(const GemmPath& path) {
  std::vector<std::string> names;
  for (const DType t : kTypes) names.push_back(packer_path(path, Packer::kLhs, t));
  for (size_t i = 0; i < path.kernel->ukernel_count; ++i) names.emplace_back(path.kernel->ukernels[i].name);
  for (size_t i = 0; path.kernel->wide && i < path.kernel->ukernel_count; ++i) {
    names.emplace_back(path.kernel->wide->ukernels[i].name);
  }
  for (const char* const use : {"gemm", "gemm random"}) names.push_back(use_path(path, use));
  if (path.kernel->wide) names.push_back(use_path(path, "gemm wide"));
  return names;
}

std::vector<std::string> paths_of(const VecKernels& vec) {
  std::vector<std::string> names = {row_path(vec, "softmax_row"), row_path(vec, "softmax_row_to_bf16"),
                                    row_path(vec, "sum_squares")};
  for (const DType t : kTypes) {
    for (const char* const f :
         {"scale_rows", "sum_layer_norm_row", "sum_rms_norm_row", "rotate_row", "accumulate_row", "max_row"}) {
      names.push_back(row_path(vec, f, dtype_name(t)));
    }
    for (size_t a = 0; a < kActivationCount; ++a) {
      names.push_back(gate_path(vec, static_cast<Activation>(a), t));
      for (const char* const residual : {"none", "f32", "bf16"}) {
        names.push_back(store_path(vec, static_cast<Activation>(a), t, residual));
      }
    }
  }
  return names;
}

}  // namespace

const std::vector<const VecKernels*>& all_vec_paths() {
  static const std::vector<const VecKernels*> all(row_kernels().begin(), row_kernels().end());
  return all;
}

// Every family of some lists, with the best row kernels that need no more than it does.
static std::vector<GemmPath> paths_in(std::initializer_list<std::span<const GemmKernel* const>> lists) {
  std::vector<GemmPath> paths;
  for (const auto& list : lists) {
    for (const GemmKernel* const kernel : list) {
      const auto fits = [&](const VecKernels* vec) {
        return (vec->required_features & ~kernel->required_features) == 0;
      };
      const VecKernels* const vec = *std::find_if(row_kernels().begin(), row_kernels().end(), fits);
      // gemm_<destination>_<left>_<right>_<tile>_<engine>
      std::string engine = kernel->ukernels[0].name;
      for (int word = 0; word < 5; ++word) engine.erase(0, engine.find('_') + 1);
      paths.push_back({kernel, vec, kernel->required_features, engine});
    }
  }
  return paths;
}

const std::vector<GemmPath>& all_gemm_paths() {
  static const std::vector<GemmPath> all = paths_in({bf16_kernels(), f32_kernels()});
  return all;
}

const std::vector<GemmPath>& all_s8_paths() {
#if defined(__x86_64__)
  static const GemmKernel* const emulated[] = {&kEmulatedVnni};
  static const std::vector<GemmPath> all = paths_in({s8_kernels(), emulated});
#else
  static const std::vector<GemmPath> all = paths_in({s8_kernels()});
#endif
  return all;
}

static std::vector<GemmPath> those_that_run(const std::vector<GemmPath>& all) {
  std::vector<GemmPath> here;
  for (const GemmPath& path : all) {
    if (runs_here(path.required_features)) here.push_back(path);
  }
  return here;
}

std::vector<GemmPath> gemm_paths() { return those_that_run(all_gemm_paths()); }
std::vector<GemmPath> s8_paths() { return those_that_run(all_s8_paths()); }

std::vector<const VecKernels*> vec_paths() {
  std::vector<const VecKernels*> here;
  for (const VecKernels* const vec : all_vec_paths()) {
    if (runs_here(vec->required_features)) here.push_back(vec);
  }
  return here;
}

void cover(const std::string& path) { covered().insert(path); }
size_t covered_paths() { return covered().size(); }

std::vector<std::string> uncovered_paths() {
  std::vector<std::string> expected, missed;
  for (const GemmPath& path : gemm_paths()) {
    for (const std::string& name : paths_of(path)) expected.push_back(name);
  }
  for (const GemmPath& path : s8_paths()) {
    for (const std::string& name : s8_paths_of(path)) expected.push_back(name);
  }
  for (const VecKernels* const vec : vec_paths()) {
    for (const std::string& name : paths_of(*vec)) expected.push_back(name);
  }
  for (const std::string& name : expected) {
    if (!covered().count(name)) missed.push_back(name);
  }
  return missed;
}

std::vector<std::string> paths_of_other_cpus() {
  std::vector<std::string> names;
  for (const std::vector<GemmPath>* const all : {&all_gemm_paths(), &all_s8_paths()}) {
    for (const GemmPath& path : *all) {
      if (!runs_here(path.required_features)) names.push_back(path.name());
    }
  }
  for (const VecKernels* const vec : all_vec_paths()) {
    if (!runs_here(vec->required_features)) names.push_back(vec->name);
  }
  return names;
}

size_t panel_index(const GemmKernel& g, size_t j, size_t p) {
  switch (g.layout) {
    case Layout::kBf16Pairs:
      return ((p / 4) * g.nr + j) * 4 + p % 4;
    case Layout::kBf16Dots:
      return ((p / 2) * g.nr + j) * 2 + p % 2;
    case Layout::kS8Groups:
      return ((p / g.kr) * g.nr + j) * g.kr + p % g.kr;
    case Layout::kBf16Halves:
      return p * 16 + j % 8 * 2 + j / 8;
    case Layout::kS8Crossed:
      return p / 4 * 128 + j / 8 * 32 + p % 2 * 16 + j % 8 * 2 + p % 4 / 2;
    default:
      return p * g.nr + j;
  }
}

size_t block_index(const GemmKernel& g, size_t mr, size_t steps, size_t i, size_t p) {
  switch (g.layout) {
    case Layout::kBf16Pairs:
      return ((p / 4) * mr + i) * 4 + p % 4;
    case Layout::kS8Groups:
      return ((p / g.kr) * mr + i) * g.kr + p % g.kr;
    case Layout::kBf16Dots:
      return ((p / g.k_step) * mr + i) * g.k_step + p % g.k_step;
    case Layout::kS8Crossed:
      return (p / 4 * mr + i) * 4 + p % 2 * 2 + p % 4 / 2;
    default:
      return i * steps * g.k_step + p;
  }
}

const char* packer_name(Packer p) {
  return p == Packer::kLhs ? "pack_lhs" : p == Packer::kRhsNxk ? "pack_rhs_nxk" : "pack_rhs_kxn";
}

void pack(const GemmPath& path, Packer packer, DType type, size_t rows, size_t block_rows, size_t k, const void* src,
          size_t ld, void* dst) {
  const GemmKernel& g = *path.kernel;
  const bool f32 = type == DType::kF32;
  cover(packer_path(path, packer, type));
  switch (packer) {
    case Packer::kLhs:
      return (f32 ? g.pack_lhs_f32 : g.pack_lhs_bf16)(rows, block_rows, k, src, ld, dst);
    case Packer::kRhsNxk:
      return (f32 ? g.pack_rhs_nxk_f32 : g.pack_rhs_nxk_bf16)(rows, block_rows, k, src, ld, dst);
    case Packer::kRhsKxn:
      return (f32 ? g.pack_rhs_kxn_f32 : g.pack_rhs_kxn_bf16)(rows, k, src, ld, dst);
  }
}

void run_ukernel(const UKernel& ukernel, size_t steps, const void* lhs, const void* rhs, float* tile, size_t ld_tile) {
  cover(ukernel.name);
  // Micro-kernels run between `begin` and `end` of their family.
  const GemmKernel* family = nullptr;
  for (const std::vector<GemmPath>* const all : {&all_gemm_paths(), &all_s8_paths()}) {
    for (const GemmPath& path : *all) {
      for (const UKernel* const first :
           {path.kernel->ukernels, path.kernel->wide ? path.kernel->wide->ukernels : nullptr}) {
        if (first && &ukernel >= first && &ukernel < first + path.kernel->ukernel_count) family = path.kernel;
      }
    }
  }
  const GemmSession session(*family);
  ukernel.run(steps, lhs, rhs, tile, ld_tile);
}

void store_tile(const VecKernels& vec, Activation a, const float* tile, size_t ld_tile, size_t rows, size_t cols,
                const Epilogue& ep, size_t row0, size_t col0) {
  cover(store_path(vec, a, ep.out_type, ep.residual ? dtype_name(ep.residual_type) : "none"));
  vec.store_tile[static_cast<size_t>(a)](tile, ld_tile, rows, cols, ep, row0, col0);
}

float softmax_row(const VecKernels& vec, float* s, size_t n, float scale) {
  cover(row_path(vec, "softmax_row"));
  return vec.softmax_row(s, n, scale);
}

float softmax_row_to_bf16(const VecKernels& vec, float* s, size_t n, float scale) {
  cover(row_path(vec, "softmax_row_to_bf16"));
  return vec.softmax_row_to_bf16(s, n, scale);
}

void scale_rows(const VecKernels& vec, size_t rows, size_t n, const float* s, size_t ld, const float* factors,
                void* out, size_t ld_out, DType out_type) {
  cover(row_path(vec, "scale_rows", dtype_name(out_type)));
  vec.scale_rows(rows, n, s, ld, factors, out, ld_out, out_type);
}

void softmax_pack(const GemmPath& path, size_t rows, size_t block_rows, size_t n, float scale, float* s, size_t ld,
                  float* sums, void* block) {
  cover(path.name() + ": softmax_pack");
  path.kernel->softmax_pack(rows, block_rows, n, scale, s, ld, sums, block);
}

void sum_layer_norm_row(const VecKernels& vec, size_t n, const void* a, const void* b, const void* c,
                        const float* b_scale, const float* weight, const float* bias, float eps, void* out, DType t) {
  cover(row_path(vec, "sum_layer_norm_row", dtype_name(t)));
  vec.sum_layer_norm_row(n, a, b, c, b_scale, weight, bias, eps, out, t);
}

void sum_rms_norm_row(const VecKernels& vec, size_t n, const void* a, const void* b, const void* c, const float* weight,
                      float eps, void* out, DType t) {
  cover(row_path(vec, "sum_rms_norm_row", dtype_name(t)));
  vec.sum_rms_norm_row(n, a, b, c, weight, eps, out, t);
}

void rotate_row(const VecKernels& vec, size_t heads, size_t head_size, const float* cos, const float* sin,
                const void* x, void* out, DType t) {
  cover(row_path(vec, "rotate_row", dtype_name(t)));
  vec.rotate_row(heads, head_size, cos, sin, x, out, t);
}

void gate_row(const VecKernels& vec, Activation a, size_t n, const void* x, const void* gate, void* out, DType t) {
  cover(gate_path(vec, a, t));
  vec.gate_row[static_cast<size_t>(a)](n, x, gate, out, t);
}

void accumulate_row(const VecKernels& vec, size_t n, const void* x, DType t, float* acc) {
  cover(row_path(vec, "accumulate_row", dtype_name(t)));
  vec.accumulate_row(n, x, t, acc);
}

void max_row(const VecKernels& vec, size_t n, const void* x, DType t, float* acc) {
  cover(row_path(vec, "max_row", dtype_name(t)));
  vec.max_row(n, x, t, acc);
}

float sum_squares(const VecKernels& vec, size_t n, const float* x) {
  cover(row_path(vec, "sum_squares"));
  return vec.sum_squares(n, x);
}

void cover_use(const GemmPath& path, const char* use) { cover(use_path(path, use)); }

GemmProblem problem_of(const Matrix& lhs, const GuardedBytes& panels, const Matrix& out) {
  GemmProblem problem;
  problem.m = lhs.rows;
  problem.n = out.cols;
  problem.k = lhs.cols;
  problem.lhs = lhs.data();
  problem.ld_lhs = lhs.ld;
  problem.lhs_type = lhs.type;
  problem.panels = panels.data();
  problem.epilogue.out = out.data();
  problem.epilogue.ld_out = out.ld;
  problem.epilogue.out_type = out.type;
  return problem;
}

}  // namespace torch_ext::test
