// Swagger UI over the gateway's own document. The key is the console's too: in this tab alone, sent to this origin alone.
const KEY = "vllm-service-key";
const SCHEMES = ["bearer", "x-api-key"];

// Descriptions are texts with `code` in them: none is parsed as Markdown or HTML, which the page's policy refuses.
const plainTexts = {
  wrapComponents: {
    Markdown: (_, { React }) => ({ source, className = "" }) => {
      if (!source) return null;
      const part = (text, index) => (index % 2 ? React.createElement("code", { key: index }, text) : text);
      return React.createElement("div", { className: `text ${className}` }, source.split("`").map(part));
    },
  },
};

const keyInTheTab = {
  statePlugins: {
    auth: {
      wrapActions: {
        authorize: (authorize) => (given) => {
          for (const name of SCHEMES) if (given[name]?.value) sessionStorage.setItem(KEY, given[name].value);
          return authorize(given);
        },
        logout: (logout) => (names) => {
          sessionStorage.removeItem(KEY);
          return logout(names);
        },
      },
    },
  },
};

// The command that is shown has no key: a variable of the shell stands for it.
const curlWithoutKey = (system) => {
  const bash = system.fn.requestSnippetGenerator_curl_bash;
  const hidden = (value, name) => {
    if (/^authorization$/i.test(name)) return "Bearer $API_KEY";
    return /^x-api-key$/i.test(name) ? "$API_KEY" : value;
  };
  const command = (request) => {
    const shown = request.update("headers", (headers) => headers && headers.map(hidden));
    return bash(shown).replace(/'([\w-]+: (?:Bearer )?\$API_KEY)'/g, '"$1"');
  };
  return { fn: { requestSnippetGenerator_curl_bash: command } };
};

const dark = matchMedia("(prefers-color-scheme: dark)");
const followScheme = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", followScheme);
followScheme();

const ui = window.SwaggerUIBundle({
  url: new URL("../openapi.json", import.meta.url).href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  plugins: [plainTexts, keyInTheTab, curlWithoutKey],
  requestSnippetsEnabled: true,
  requestSnippets: { languages: ["curl_bash"] },
  validatorUrl: null, // it would be another host's
  onComplete: () => {
    const key = sessionStorage.getItem(KEY);
    if (key) ui.preauthorizeApiKey(SCHEMES[0], key);
  },
});
