"""Pages in the browser, Gradio's: videos made of images and of prompts, and runs while they train."""
