#include "engine/cuda/gemm.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <fmt/format.h>

namespace compact::engine {

const char* Gemm::library() noexcept { return "libcublasLt.so.13"; }

// One member for every function in use, named as the library names it.
struct CublasLt {
  void* library = nullptr;
  cublasLtHandle_t handle = nullptr;
#define CA_CUBLASLT(name) decltype(&::name) name = nullptr
  CA_CUBLASLT(cublasLtCreate);
  CA_CUBLASLT(cublasLtDestroy);
  CA_CUBLASLT(cublasLtGetStatusString);
  CA_CUBLASLT(cublasLtMatmul);
  CA_CUBLASLT(cublasLtMatmulDescCreate);
  CA_CUBLASLT(cublasLtMatmulDescDestroy);
  CA_CUBLASLT(cublasLtMatmulDescSetAttribute);
  CA_CUBLASLT(cublasLtMatrixLayoutCreate);
  CA_CUBLASLT(cublasLtMatrixLayoutDestroy);
  CA_CUBLASLT(cublasLtMatmulPreferenceCreate);
  CA_CUBLASLT(cublasLtMatmulPreferenceDestroy);
  CA_CUBLASLT(cublasLtMatmulPreferenceSetAttribute);
  CA_CUBLASLT(cublasLtMatmulAlgoGetHeuristic);
#undef CA_CUBLASLT

  CublasLt() = default;
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;
  ~CublasLt() {
    if (handle != nullptr) cublasLtDestroy(handle);
    if (library != nullptr) dlclose(library);
  }

  [[nodiscard]] Status check(cublasStatus_t status, std::string_view what) const {
    if (status == CUBLAS_STATUS_SUCCESS) return {};
    return cuda_error(fmt::format("cuBLASLt: {}: {}", what, cublasLtGetStatusString(status)));
  }
};

namespace {

Status resolve(CublasLt& lt) {
  const auto find = [&](auto& function, const char* name) -> Status {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(lt.library, name));
    if (function != nullptr) return {};
    return unsupported(fmt::format("{} has no {}\n  allowed: cuBLASLt of CUDA 13", Gemm::library(), name));
  };
#define CA_FIND(name) CA_RETURN_IF_ERROR(find(lt.name, #name))
  CA_FIND(cublasLtCreate);
  CA_FIND(cublasLtDestroy);
  CA_FIND(cublasLtGetStatusString);
  CA_FIND(cublasLtMatmul);
  CA_FIND(cublasLtMatmulDescCreate);
  CA_FIND(cublasLtMatmulDescDestroy);
  CA_FIND(cublasLtMatmulDescSetAttribute);
  CA_FIND(cublasLtMatrixLayoutCreate);
  CA_FIND(cublasLtMatrixLayoutDestroy);
  CA_FIND(cublasLtMatmulPreferenceCreate);
  CA_FIND(cublasLtMatmulPreferenceDestroy);
  CA_FIND(cublasLtMatmulPreferenceSetAttribute);
  CA_FIND(cublasLtMatmulAlgoGetHeuristic);
#undef CA_FIND
  return {};
}

}  // namespace

// Rows of y = W x are columns for cuBLASLt, which counts column by column: y^T [out, rows] = W [out, in] x^T.
struct Gemm::Plan {
  const CublasLt* lt = nullptr;
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulAlgo_t algorithm{};

  explicit Plan(const CublasLt& library) : lt(&library) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (preference != nullptr) lt->cublasLtMatmulPreferenceDestroy(preference);
    for (const auto layout : {w, x, y}) {
      if (layout != nullptr) lt->cublasLtMatrixLayoutDestroy(layout);
    }
    if (operation != nullptr) lt->cublasLtMatmulDescDestroy(operation);
  }
};

Gemm::Gemm() : lt_(std::make_unique<CublasLt>()) {}
Gemm::~Gemm() = default;

Result<std::unique_ptr<Gemm>> Gemm::create() {
  std::unique_ptr<Gemm> gemm(new Gemm);
  gemm->lt_->library = dlopen(Gemm::library(), RTLD_NOW | RTLD_LOCAL);
  if (gemm->lt_->library == nullptr) {
    const char* const reason = dlerror();
    return unsupported(fmt::format(
        "cuBLASLt is not found ({})\n"
        "  try: the folder that holds {} in LD_LIBRARY_PATH; it comes with the CUDA toolkit and with PyTorch",
        reason == nullptr ? "no reason given" : reason, Gemm::library()));
  }
  CA_RETURN_IF_ERROR(resolve(*gemm->lt_));
  CA_RETURN_IF_ERROR(gemm->lt_->check(gemm->lt_->cublasLtCreate(&gemm->lt_->handle), "start"));
  return gemm;
}

Result<const Gemm::Plan*> Gemm::plan_for(const Shape& shape) {
  const std::lock_guard lock(mutex_);
  if (const auto found = plans_.find(shape); found != plans_.end()) return found->second.get();
  const auto [out, in, rows, output] = shape;
  const CublasLt& lt = *lt_;
  auto plan = std::make_unique<Plan>(lt);
  CA_RETURN_IF_ERROR(lt.check(lt.cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "plan"));
  const cublasOperation_t transpose = CUBLAS_OP_T;
  CA_RETURN_IF_ERROR(lt.check(
      lt.cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)),
      "plan"));
  const auto layout = [&](cublasLtMatrixLayout_t& made, cudaDataType_t type, std::int32_t rows_of,
                          std::int32_t columns) {
    return lt.check(lt.cublasLtMatrixLayoutCreate(&made, type, static_cast<std::uint64_t>(rows_of),
                                                  static_cast<std::uint64_t>(columns), rows_of),
                    "plan");
  };
  CA_RETURN_IF_ERROR(layout(plan->w, CUDA_R_16BF, in, out));
  CA_RETURN_IF_ERROR(layout(plan->x, CUDA_R_16BF, in, rows));
  CA_RETURN_IF_ERROR(layout(plan->y, output == Output::kF32 ? CUDA_R_32F : CUDA_R_16BF, out, rows));
  CA_RETURN_IF_ERROR(lt.check(lt.cublasLtMatmulPreferenceCreate(&plan->preference), "plan"));
  const auto workspace = static_cast<std::uint64_t>(kWorkspaceBytes);
  CA_RETURN_IF_ERROR(
      lt.check(lt.cublasLtMatmulPreferenceSetAttribute(plan->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                       &workspace, sizeof(workspace)),
               "plan"));
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  const cublasStatus_t status = lt.cublasLtMatmulAlgoGetHeuristic(lt.handle, plan->operation, plan->w, plan->x, plan->y,
                                                                  plan->y, plan->preference, 1, &best, &found);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || (status == CUBLAS_STATUS_SUCCESS && found == 0)) {
    return unsupported(fmt::format("cuBLASLt has no kernel for [{}, {}] x [{}, {}] in bf16", rows, in, in, out));
  }
  CA_RETURN_IF_ERROR(lt.check(status, "choice of a kernel"));
  plan->algorithm = best.algo;
  return plans_.emplace(shape, std::move(plan)).first->second.get();
}

Status Gemm::run(const void* w, const void* x, void* y, std::int32_t out, std::int32_t in, std::int32_t rows,
                 Output output, void* workspace, cudaStream_t stream) {
  CA_ASSIGN_OR_RETURN(const Plan* const plan, plan_for({out, in, rows, output}));
  const float one = 1;
  const float keep = output == Output::kBf16Accumulate ? 1 : 0;
  return lt_->check(
      lt_->cublasLtMatmul(lt_->handle, plan->operation, &one, w, plan->w, x, plan->x, &keep, y, plan->y, y, plan->y,
                          &plan->algorithm, workspace, static_cast<std::size_t>(kWorkspaceBytes), stream),
      fmt::format("product [{}, {}] x [{}, {}]", rows, in, in, out));
}

}  // namespace compact::engine
