// Search from disk. A browser starts no worker for a page that it opened as a file, so a hidden frame
// runs the worker's script, and messages go both ways as to a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise((resolve) => { frame.onload = () => resolve(frame.contentWindow); });
      document.body.appendChild(frame);
      const page = frame.contentDocument;
      page.open();
      frame.contentWindow.postMessage = (data) =>
        this.dispatchEvent(new MessageEvent("message", { data }));
      const script = page.createElement("script");
      script.src = new URL(url, location.href).href;
      page.write(script.outerHTML);
      page.close();
    }

    postMessage(data) {
      this.ready.then((frame) => frame.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
