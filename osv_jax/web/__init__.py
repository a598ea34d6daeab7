"""Pages in the browser, Gradio's: videos made of images, and runs while they train."""
