// Operators latent_forward and latent_backward: check, allocate, fill the params, launch. Compiled once per library,
// with its FASTGEN_DISPATCH_KEY.
#include <tuple>

#include "common/operand_checks.h"
#include "latent/launch.h"
#include "latent/plan.h"

namespace fastgen::latent {
namespace {

// An optional (rows, cols) operand, read in place.
Input input(const MaybeTensor& tensor, const char* name, const Tensor& mu) {
  if (!tensor.has_value()) return {};
  STD_TORCH_CHECK(mu.dim() == 2, "mu: expected two dims, got shape ", text_of(mu.sizes()));
  check_operand(*tensor, name, mu.sizes(), mu.scalar_type(), mu);
  STD_TORCH_CHECK(tensor->numel() == 0 || tensor->size(1) == 1 || tensor->stride(1) == 1, name,
                  ": expected a contiguous last dim, got strides ", text_of(tensor->strides()));
  return {tensor->const_data_ptr(), tensor->size(0) > 1 ? tensor->stride(0) : 0};
}

Noise noise(const Tensor& seed, const Tensor& mu) {
  const int64_t count = seed.numel(), rows = mu.size(0);
  check_seed(seed, rows, mu);
  return {seed.const_data_ptr<int64_t>(), rows > count ? rows / count : 1};
}

int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

std::tuple<Tensor, Tensor> forward(const Tensor& mu, const Tensor& logvar, const MaybeTensor& prior_mu,
                                   const MaybeTensor& prior_logvar, const Tensor& seed, bool with_kl) {
  const DType dtype = dtype_of(mu, "mu");
  const DeviceScope scope(mu);
  ForwardParams p;
  p.mu = input(mu, "mu", mu);
  p.logvar = input(logvar, "logvar", mu);
  p.prior_mu = input(prior_mu, "prior_mu", mu);
  p.prior_logvar = input(prior_logvar, "prior_logvar", mu);
  p.noise = noise(seed, mu);
  p.rows = mu.size(0), p.cols = mu.size(1);
  Tensor z = empty<2>(mu, {p.rows, p.cols}, mu.scalar_type());
  Tensor kl = empty<1>(mu, {with_kl ? p.rows : 0}, ScalarType::Float);
  std::optional<Tensor> partial;
  p.z = z.mutable_data_ptr();
  if (with_kl) {
    p.kl = static_cast<float*>(kl.mutable_data_ptr());
    const Plan plan = make_plan(p.rows, p.cols, element_size(dtype), multiprocessors());
    if (plan.splits > 1) {
      partial = empty<2>(mu, {p.rows, plan.splits}, ScalarType::Float);
      p.partial = static_cast<float*>(partial->mutable_data_ptr());
    }
  }
  if (p.rows > 0 && (p.cols > 0 || with_kl)) launch_forward(p, dtype, scope.stream());
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const MaybeTensor& grad_z, const MaybeTensor& grad_kl,
                                                    const Tensor& mu, const Tensor& logvar, const MaybeTensor& prior_mu,
                                                    const MaybeTensor& prior_logvar, const Tensor& seed) {
  const DType dtype = dtype_of(mu, "mu");
  const DeviceScope scope(mu);
  BackwardParams p;
  p.grad_z = input(grad_z, "grad_z", mu);
  p.mu = input(mu, "mu", mu);
  p.logvar = input(logvar, "logvar", mu);
  p.prior_mu = input(prior_mu, "prior_mu", mu);
  p.prior_logvar = input(prior_logvar, "prior_logvar", mu);
  p.noise = noise(seed, mu);
  p.rows = mu.size(0), p.cols = mu.size(1);
  if (grad_kl.has_value()) {
    check_operand(*grad_kl, "grad_kl", {p.rows}, ScalarType::Float, mu);
    p.grad_kl = grad_kl->const_data_ptr<float>();
    p.grad_kl_stride = grad_kl->stride(0);
  }
  const auto like_mu = [&](bool wanted) {
    return wanted ? empty<2>(mu, {p.rows, p.cols}, mu.scalar_type()) : empty<1>(mu, {0}, mu.scalar_type());
  };
  Tensor grad_mu = like_mu(true), grad_logvar = like_mu(true);
  Tensor grad_prior_mu = like_mu(prior_mu.has_value()), grad_prior_logvar = like_mu(prior_logvar.has_value());
  p.grad_mu = grad_mu.mutable_data_ptr(), p.grad_logvar = grad_logvar.mutable_data_ptr();
  if (prior_mu.has_value()) p.grad_prior_mu = grad_prior_mu.mutable_data_ptr();
  if (prior_logvar.has_value()) p.grad_prior_logvar = grad_prior_logvar.mutable_data_ptr();
  if (p.rows > 0 && p.cols > 0) launch_backward(p, dtype, scope.stream());
  return {grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar};
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("latent_forward", TORCH_BOX(&forward));
  m.impl("latent_backward", TORCH_BOX(&backward));
}

}  // namespace fastgen::latent
