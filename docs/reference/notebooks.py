"""A hook of mkdocs: each notebook becomes a page in Markdown, with its pictures, so that its links are checked too."""

import base64

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter


class Notebook(File):
    """A file that mkdocs treats as a page."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files, config):
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        files.append(Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files


def on_page_read_source(page, config):
    """The Markdown of a notebook; None for other pages, which mkdocs reads."""
    if not page.file.src_uri.endswith(".ipynb"):
        return None
    text, resources = MarkdownExporter().from_filename(page.file.abs_src_path)
    text = text.replace("```bash\n%%bash\n", "```bash\n")
    for name, data in resources["outputs"].items():
        text = text.replace(f"]({name})", f"](data:image/png;base64,{base64.b64encode(data).decode()})")
    return text
