from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="deitlt-hf",
    version="0.1.0",
    description="DeiT-LT: Vision Transformers trained from scratch on long-tailed images, for transformers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"deitlt_hf.recipes": ["*.yaml"], "deitlt_hf.analysis": ["*.html"]},
    entry_points={"console_scripts": ["deitlt=deitlt_hf.cli:main"]},
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.0",
        "evaluate>=0.4.3",
        "filelock>=3.13",
        "numpy>=1.26",
        "pillow>=10",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "timm>=1.0.20",
        "torch>=2.6",
        "torchvision>=0.21",
        "transformers>=5.23,<6",
    ],
    extras_require={
        "analysis": ["curvlinops-for-pytorch>=3", "jinja2>=3", "matplotlib>=3.8"],
        "dev": [
            "curvlinops-for-pytorch>=3",
            "hypothesis>=6",
            "jinja2>=3",
            "matplotlib>=3.8",
            "peft>=0.15",
            "psutil>=5",
            "pytest>=8",
            "pytest-timeout>=2",
            "ruff>=0.12",
        ],
    },
)
