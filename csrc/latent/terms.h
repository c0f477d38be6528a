// The arithmetic of one element, the same on every backend. Formulas: fastgen/reference.py.
#pragma once

#include "common/math.h"
#include "common/types.h"

namespace fastgen::latent {

// Twice the element's share of KL(N(mu, e^logvar) || N(0, 1)); std = e^(logvar / 2).
FASTGEN_HOST_DEVICE float kl_term(float mu, float logvar, float std) { return mu * mu + (std * std - 1.0f - logvar); }

// The same against N(prior_mu, e^prior_logvar).
FASTGEN_HOST_DEVICE float kl_term(float mu, float logvar, float prior_mu, float prior_logvar) {
  const float difference = mu - prior_mu, ratio = logvar - prior_logvar;
  return difference * difference * exp_float(-prior_logvar) + (exp_float(ratio) - 1.0f - ratio);
}

struct Gradients {
  float mu, logvar, prior_mu, prior_logvar;
};

// Gradients of one element against the unit normal. noise_std = noise * std.
FASTGEN_HOST_DEVICE Gradients gradients(float grad_z, float grad_kl, float noise_std, float mu, float std) {
  return {grad_z + grad_kl * mu, 0.5f * (grad_z * noise_std + grad_kl * (std * std - 1.0f)), 0.0f, 0.0f};
}

FASTGEN_HOST_DEVICE Gradients gradients(float grad_z, float grad_kl, float noise_std, float mu, float logvar,
                                        float prior_mu, float prior_logvar) {
  const float ratio = exp_float(logvar - prior_logvar);
  const float difference = mu - prior_mu, slope = difference * exp_float(-prior_logvar);
  return {grad_z + grad_kl * slope, 0.5f * (grad_z * noise_std + grad_kl * (ratio - 1.0f)), -grad_kl * slope,
          0.5f * grad_kl * (1.0f - ratio - difference * slope)};
}

}  // namespace fastgen::latent
