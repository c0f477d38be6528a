"""Metrics of generative models: likelihoods and distances in a named feature space, with confidence intervals.

Functions take tensors and modules. They are independent of fastgen's models, files and training.

    space = classifier_features(images, labels, data="digits")
    for metric in evaluate_images(held_out, generated, space, training=images):
        print(metric)
"""

from __future__ import annotations

from fastgen.metrics.bootstrap import Interval, bootstrap_interval, bootstrap_sets, proportion_interval
from fastgen.metrics.captions import caption_agreement
from fastgen.metrics.copies import closer_than_held_out, nearest_training
from fastgen.metrics.distances import Neighborhoods, frechet_distance, kernel_distance, neighborhoods
from fastgen.metrics.features import FeatureSpace, classifier_features, inception_features, rotation_features
from fastgen.metrics.images import class_agreement, evaluate_images
from fastgen.metrics.likelihood import ImportanceWeightedBound, bits_per_dim, importance_weighted_bound, perplexity
from fastgen.metrics.sounds import SHORTEST, evaluate_sounds, harmonicity
from fastgen.metrics.summary import Metric, summarize
from fastgen.metrics.translations import evaluate_domains, evaluate_pairs, structural_similarity

__all__ = [
    "SHORTEST",
    "FeatureSpace",
    "ImportanceWeightedBound",
    "Interval",
    "Metric",
    "Neighborhoods",
    "bits_per_dim",
    "bootstrap_interval",
    "bootstrap_sets",
    "caption_agreement",
    "class_agreement",
    "classifier_features",
    "closer_than_held_out",
    "evaluate_domains",
    "evaluate_images",
    "evaluate_pairs",
    "evaluate_sounds",
    "frechet_distance",
    "harmonicity",
    "importance_weighted_bound",
    "inception_features",
    "kernel_distance",
    "nearest_training",
    "neighborhoods",
    "perplexity",
    "proportion_interval",
    "rotation_features",
    "structural_similarity",
    "summarize",
]
