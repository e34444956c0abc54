#!/usr/bin/env bash
# MAUVE of a set of texts with itself can be 0.75, and on another CPU 1.0.
#
# Packages: mauve-text 0.4.0, numpy 2.4.6, scikit-learn 1.9.1, faiss-cpu 1.15.1; Python 3.11.
# Seen on an Intel Xeon (Skylake, AVX-512):
#     with numpy's AVX2 or AVX-512 sort      0.75
#     without (NPY_DISABLE_CPU_FEATURES)     1.0
#
# If both histograms are equal and the divergences come out as exactly 0 (as here, with shares of a
# quarter, a half or all), each inner point of the divergence curve is exactly (1, 1). The ends are
# (1, 0) and (0, 1). compute_mauve sorts the curve by x, and again by y, with np.argsort, and takes
# the area. Of equal keys argsort keeps no order, so the end (1, 0) may come to stand among or behind
# the points (1, 1). Then a triangle is missing. Which order comes out depends on the sort that numpy
# takes for the CPU. Small sets with few clusters are where this happens: `num_buckets="auto"` is a
# tenth of the number of texts.
#
#     bash findings/mauve_of_equal_histograms.sh     # exits 1 if this is not so any more
#
# It needs a CPU with AVX2, some 500 MB and a minute.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q mauve-text==0.4.0 numpy==2.4.6 scikit-learn==1.9.1 faiss-cpu==1.15.1
cat > "$work/same.py" << 'EOF'
import mauve
import numpy as np

# 32 texts in four clusters of 8, far apart.
noise = np.random.default_rng(0).normal(size=(32, 8))
centres = 100 * np.eye(8)[np.arange(32) % 4]
features = (centres + noise).astype(np.float32)
for clusters in (1, 2, 4):
    result = mauve.compute_mauve(
        p_features=features, q_features=features.copy(), num_buckets=clusters, seed=1, verbose=False
    )
    assert np.array_equal(result.p_hist, result.q_hist)
    print(f"{clusters} clusters, {result.p_hist}: {result.mauve:.4f}")
EOF
run() { "$work/venv/bin/python" "$work/same.py" 2> /dev/null; }
echo "as numpy chooses:"
run | tee "$work/fast"
echo "without AVX2 and AVX-512:"
NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4" run | tee "$work/plain"
grep -q ": 0.7500" "$work/fast"
[ "$(grep -c ": 1.0000" "$work/plain")" = 3 ]
