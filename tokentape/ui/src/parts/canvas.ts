// Canvases: sharp on every screen, drawn anew when their size or the page's colours change.
import { useEffect } from "preact/hooks";

// A pen that draws in CSS pixels on an emptied canvas of this height, and the page's colours by name.
export function penOf(canvas: HTMLCanvasElement, height: number): { pen: CanvasRenderingContext2D; of: (name: string) => string } {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d")!;
  const color = getComputedStyle(canvas);
  pen.scale(ratio, ratio);
  pen.font = `11px ${color.getPropertyValue("font-family")}`;
  return { pen, of: (name) => color.getPropertyValue(`--${name}`).trim() };
}

export function useDrawn(canvas: { current: HTMLCanvasElement | null }, draw: (canvas: HTMLCanvasElement) => void, inputs: unknown[]): void {
  useEffect(() => {
    const again = (): void => {
      if (canvas.current) draw(canvas.current);
    };
    const watch = new ResizeObserver(again); // tells the size of what it begins to watch, too
    if (canvas.current) watch.observe(canvas.current);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", again);
    return () => {
      watch.disconnect();
      scheme.removeEventListener("change", again);
    };
  }, inputs);
}
