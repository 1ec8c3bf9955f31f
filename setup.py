from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


# Listed, not found: kernels/ and weights/ lie at the top without __init__.py, so that no top-level `kernels` package
# exists. They are imported as parts of masa.
FOLDERS = {
    "masa": "masa",
    "masa.cache": "masa/cache",
    "masa.cli": "masa/cli",
    "masa.controls": "masa/controls",
    "masa.io": "masa/io",
    "masa.kernels": "kernels",
    "masa.metrics": "masa/metrics",
    "masa.models": "masa/models",
    "masa.output": "masa/output",
    "masa.runtime": "masa/runtime",
    "masa.samplers": "masa/samplers",
    "masa.weights": "weights",
    "masa.weights.demo": "weights/demo",
    "masa.workflows": "masa/workflows",
}


def data(package: str, *patterns: str) -> list[str]:
    """Data files of a package, relative to it."""
    folder = HERE / FOLDERS[package]
    return sorted(str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern))


setup(
    name="masa",
    version="0.1.0",
    description="MasaCtrl and its neighbours on Stable Diffusion v1, from scratch in PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={
        "masa": ["py.typed"],
        "masa.output": data("masa.output", "fonts/*"),
        "masa.weights": data("masa.weights", "clip/*"),
        "masa.weights.demo": data(
            "masa.weights.demo", "*.md", "*.png", "*.json", "*.safetensors", "model/**/*.*", "adapter/*.*"
        ),
    },
    # .ci/versions runs the suite's core with all lower bounds at once, and with the newest releases. torch is bounded
    # above because the compiler's private names change with it.
    install_requires=[
        "torch>=2.6,<2.15",  # each pins its Triton: 2.6 has 3.2, 2.14 has 3.8
        "safetensors>=0.6.1",  # the first that lists tensors in the file's order
        "transformers>=4.45",
        "tokenizers>=0.20.3",  # the first that refuses broken bytes
        "huggingface_hub>=0.26",
        "einops>=0.8",
        "pillow>=10.1",
        "numpy>=1.26",
        "tqdm>=4.66",
        # Below 3.4 it serialises the products of compute capability 9.x, where "auto" then is SDPA: kernels/launch.py.
        "triton>=3.2,<3.10; sys_platform == 'linux'",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            "diffusers>=0.30",
            "accelerate>=0.30",
            "peft>=0.13",
            "imageio-ffmpeg>=0.5",
            "scikit-image>=0.22",
            "scipy>=1.10",
            "opencv-python-headless>=4.8.0.74",
            "matplotlib>=3.8",
            "ray>=2.40",
            "nbclient>=0.9",
            "ipykernel>=6",
            "torchmetrics>=1.5",  # the first whose SSIM counts the border in
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<2.5",
        ],
        "plots": ["matplotlib>=3.8"],
        "video": ["imageio-ffmpeg>=0.5"],
        "ray": ["ray>=2.40"],
        # LPIPS wants torchvision too. That one must come from where torch came: a build of another kind, which a plain
        # requirement may bring, fails to import, and transformers with it.
        "bench": ["torchmetrics>=1.5"],
        "conditions": ["scikit-image>=0.22", "scipy>=1.10"],
    },
    entry_points={"console_scripts": ["masa = masa.cli:main"]},
)
