/* Browsers start no worker from file:// URLs, and the site's search is one. Opened from a folder, it runs in a hidden
   frame instead. The theme's own stand-in for this would be loaded from the network. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { hidden: true }));
      const inside = this.frame.contentWindow;
      inside.postMessage = data => this.answer(data);
      const script = Object.assign(inside.document.createElement("script"), { src: url });
      this.started = new Promise(resolve => { script.onload = resolve; });
      inside.document.body.appendChild(script);
    }

    answer(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      if (this.onmessage) this.onmessage(event);
    }

    async postMessage(data) {
      await this.started;
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() { this.frame.remove(); }
  };
}
